"""What KVM says to a request for a slot, against an independent account of its rules."""

import errno

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestfault.errors import KvmError
from guestfault.softkvm.memslots import KvmMemorySlot, Memslots, kvm_set_memory_region
from guestfault.uapi import kvm as uapi

FLAGS = 7
PAGE = 4096
pages = st.integers(0, 8).map(lambda n: n * PAGE)
odd = st.sampled_from([0, 0, 0, 0, 0, 1, 0x800])
requests = st.lists(
    st.tuples(
        st.integers(0, 3),  # slot
        st.builds(int.__add__, pages, odd),  # gpa
        st.builds(int.__add__, st.integers(0, 4).map(lambda n: n * PAGE), odd),  # size
        st.builds(lambda n, o: 0x10_0000 + n + o, pages, odd),  # hva
        st.sampled_from([0, 0, 1, 2, 3, 4, 8]),
    ),
    max_size=12,
)


class Model:
    """Slots as sets of pages, and the rules as the manual (api.rst, 4.35) tells them."""

    def __init__(self):
        self.slots = {}

    def request(self, slot, gpa, size, hva, flags):
        if flags & ~FLAGS or gpa % PAGE or size % PAGE or hva % PAGE:
            return -errno.EINVAL
        old = self.slots.get(slot)
        if size == 0:
            if old is None:
                return -errno.EINVAL
            del self.slots[slot]
            return 0
        if old is not None:
            same_backing = old["hva"] == hva and old["size"] == size
            if not same_backing or (old["flags"] ^ flags) & uapi.KVM_MEM_READONLY:
                return -errno.EINVAL
        mine = set(range(gpa, gpa + size, PAGE))
        rivals = (one for name, one in self.slots.items() if name != slot)
        if any(mine & one["pages"] for one in rivals):
            return -errno.EEXIST
        self.slots[slot] = {"gpa": gpa, "size": size, "hva": hva, "flags": flags, "pages": mine}
        return 0


@given(requests)
@settings(max_examples=300, deadline=None)
def test_any_requests(asked):
    model, memslots = Model(), Memslots()
    for request in asked:
        slot, gpa, size, hva, flags = request
        mem = uapi.kvm_userspace_memory_region(slot, flags, gpa, size, hva)
        r, old, new = kvm_set_memory_region(memslots, mem, FLAGS)
        assert r == model.request(*request)
        if old or new:
            memslots = memslots.replaced(old, new)
        for page in range(0, 16 * PAGE, PAGE):
            found = memslots.gfn_to_memslot(page // PAGE)
            holder = next((n for n, s in model.slots.items() if page in s["pages"]), None)
            assert (found.id if found else None) == holder
            if found is not None:
                one = model.slots[holder]
                assert found.hva_of_gfn(page // PAGE) == one["hva"] + page - one["gpa"]


@pytest.mark.parametrize(
    ("change", "number"),
    [
        ({"slot": 1, "guest_phys_addr": 0x3000}, None),
        ({"slot": 1}, errno.EEXIST),
        ({"slot": 1, "guest_phys_addr": 0x1000, "memory_size": 0x1000}, errno.EEXIST),
        ({"memory_size": 0x1000}, errno.EINVAL),
        ({"userspace_addr": 0}, errno.EINVAL),
        ({"flags": 2}, errno.EINVAL),
        ({"guest_phys_addr": 0x800}, errno.EINVAL),
        ({"slot": 1, "guest_phys_addr": 0x3000, "flags": 1 << 20}, errno.EINVAL),
        ({"slot": 1, "memory_size": 0}, errno.EINVAL),
        ({"slot": 1 << 15, "guest_phys_addr": 0x3000}, errno.EINVAL),
        ({"slot": 1, "guest_phys_addr": 2**64 - 0x2000}, errno.EINVAL),
        ({"slot": 1, "guest_phys_addr": 0x3000, "userspace_addr": 1 << 47}, errno.EINVAL),
        ({"guest_phys_addr": 0x8000}, None),
        ({"flags": 1}, None),
        ({}, None),
        ({"memory_size": 0}, None),
    ],
)
def test_the_same_answer_as_the_kernel(system, start, change, number):
    machine = start("", "long-cpl3")
    vm = system.create_vm()
    request = {
        "slot": 0,
        "guest_phys_addr": 0,
        "memory_size": 0x3000,
        "userspace_addr": machine.ram.guest.address,
        "flags": 0,
    }
    vm.set_user_memory_region(**request)
    try:
        if number is None:
            vm.set_user_memory_region(**request | change)
        else:
            with pytest.raises(KvmError) as caught:
                vm.set_user_memory_region(**request | change)
            assert caught.value.errno == number
    finally:
        vm.close()


@pytest.mark.parametrize(("dialect", "known"), [("seed", True), ("linux-6.8", False)])
def test_the_flag_that_exits_on_a_missing_page(soft, dialect, known):
    machine = soft(dialect=dialect)
    request = (1, 0x40_0000, 0x1000, machine.ram.guest.address, 1 << 2)
    if known:
        machine.vm.set_user_memory_region(*request)
    else:
        with pytest.raises(KvmError) as caught:
            machine.vm.set_user_memory_region(*request)
        assert caught.value.errno == errno.EINVAL


def test_marking_dirty():
    slot = KvmMemorySlot(0, 0x100, 20, 0, uapi.KVM_MEM_LOG_DIRTY_PAGES, bytearray(8))
    for gfn in (0x100, 0x109, 0x113):
        slot.mark_page_dirty(gfn)
    assert slot.dirty_bitmap == bytes([1, 2, 8, 0, 0, 0, 0, 0])
    KvmMemorySlot(0, 0x100, 20, 0, 0).mark_page_dirty(0x100)  # no log, no error
