"""The fault path by itself, on a modelled host memory that fails and changes at chosen moments."""

import errno

import pytest

from guestfault.dialect.interface import EHWPOISON
from guestfault.dialect.published import LINUX_6_8, SEED
from guestfault.fault.outcome import BareFault
from guestfault.softkvm.kvm_host import vcpu_load, vcpu_put
from guestfault.softkvm.memslots import KvmMemorySlot
from guestfault.softkvm.mmu import kvm_mmu_do_page_fault
from guestfault.softkvm.mmu_internal import RetPf
from guestfault.softkvm.second_stage import PT_READ, PT_WRITABLE
from guestfault.softkvm.vm import SoftVm
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import PFERR_WRITE_MASK

HVA, NPAGES = 0x7000_0000_0000, 16
READ, WRITE = 0, PFERR_WRITE_MASK
ABSENT_FLAG = 1 << 2


class ModelMm:
    """Pages are present, writable, or fail with an errno; a hook runs in the middle of GUP."""

    def __init__(self):
        self.present, self.writable, self.failing = set(), set(), {}
        self.fast, self.slow = [], []
        self.in_gup = lambda: None

    def get_user_page_fast_only(self, hva, write):
        self.fast.append((hva, write))
        return hva in self.present and (not write or hva in self.writable)

    def get_user_pages_unlocked(self, hva, write):
        self.slow.append((hva, write))
        if hva in self.failing:
            return -self.failing[hva]
        self.present.add(hva)
        if write:
            self.writable.add(hva)
        self.in_gup()
        return 0

    def copy_from_user(self, hva, size):
        return bytes(size)

    def copy_to_user(self, hva, data):
        return True

    def mmu_notifier_register(self, notifier):
        pass

    def mmu_notifier_unregister(self, notifier):
        pass


class Fixture:
    def __init__(self, dialect=SEED, flags=0):
        self.mm = ModelMm()
        self.vm = SoftVm(dialect, self.mm)
        self.vm.set_user_memory_region(0, 0, NPAGES << 12, HVA, flags)
        self.vcpu = self.vm.create_vcpu(0).arch
        self.stage = self.vm.kvm.second_stage
        vcpu_load(self.vcpu)

    def fault(self, gfn, code=READ, **options):
        return kvm_mmu_do_page_fault(self.vcpu, gfn << 12, code, **options)


@pytest.fixture
def make():
    made = []

    def make(*args, **options):
        made.append(Fixture(*args, **options))
        return made[-1]

    yield make
    vcpu_put()
    for one in made:
        one.vm.close()


def test_a_present_page_is_mapped_without_slow_gup(make):
    one = make()
    one.mm.present = one.mm.writable = {HVA + 0x3000}
    assert one.fault(3) == RetPf.FIXED
    assert one.stage.sptes == {3: HVA + 0x3000 | PT_READ | PT_WRITABLE}
    assert one.mm.slow == []
    assert one.fault(3, WRITE) == RetPf.SPURIOUS
    assert (one.vcpu.stat.pf_taken, one.vcpu.stat.pf_fixed, one.vcpu.stat.pf_spurious) == (2, 1, 1)


def test_a_read_fault_is_answered_with_a_writable_page_only_if_that_is_free(make):
    one = make()
    assert one.fault(3) == RetPf.FIXED
    assert one.stage.sptes[3] == HVA + 0x3000 | PT_READ
    assert one.mm.slow == [(HVA + 0x3000, False)]
    assert one.fault(3, WRITE) == RetPf.FIXED
    assert one.stage.sptes[3] & PT_WRITABLE


def test_the_flag_means_that_slow_gup_is_not_asked(make):
    one = make(flags=ABSENT_FLAG)
    assert one.fault(5, WRITE) == -errno.EFAULT
    assert one.mm.slow == []
    fault = one.vcpu.run.memory_fault
    assert (one.vcpu.run.exit_reason, fault.gpa, fault.size, fault.flags) == (38, 0x5000, 4096, 2)


@pytest.mark.parametrize(
    ("number", "result"),
    [(errno.EFAULT, -errno.EFAULT), (EHWPOISON, -EHWPOISON), (errno.EINTR, -errno.EINTR)],
)
def test_what_slow_gup_fails_with(make, number, result):
    one = make(LINUX_6_8)
    one.mm.failing[HVA + 0x4000] = number
    one.vcpu.run.exit_reason = 77
    assert one.fault(4) == result
    expected = uapi.KVM_EXIT_INTR if number == errno.EINTR else 77
    assert one.vcpu.run.exit_reason == expected
    assert one.stage.sptes == {}


def test_hwpoison_is_told_apart_by_userspace(make):
    from guestfault.fault.outcome import outcome

    one = make(LINUX_6_8)
    one.mm.failing[HVA] = EHWPOISON
    found = outcome(one.fault(0), one.vcpu.run, LINUX_6_8.interface)
    assert found == BareFault(EHWPOISON)


def test_no_slot_is_a_device(make):
    assert make().fault(NPAGES) == RetPf.EMULATE


def test_a_write_to_a_read_only_slot_is_emulated_and_a_read_maps_it_so(make):
    one = make(flags=uapi.KVM_MEM_READONLY)
    one.mm.present = one.mm.writable = {HVA}
    assert one.fault(0) == RetPf.FIXED
    assert one.stage.sptes[0] == HVA | PT_READ
    assert one.fault(0, WRITE) == RetPf.EMULATE
    assert (HVA, True) not in one.mm.fast


def test_a_logged_page_is_writable_only_after_a_write(make):
    one = make(flags=uapi.KVM_MEM_LOG_DIRTY_PAGES)
    one.mm.present = one.mm.writable = {HVA}
    assert one.fault(0) == RetPf.FIXED
    assert not one.stage.sptes[0] & PT_WRITABLE
    assert one.vm.get_dirty_log(0)[0] == 0
    assert one.fault(0, WRITE) == RetPf.FIXED
    assert one.stage.sptes[0] & PT_WRITABLE
    assert one.vm.get_dirty_log(0)[0] == 1
    assert not one.stage.sptes[0] & PT_WRITABLE


def test_a_page_that_goes_in_the_middle_of_gup_is_not_installed(make):
    """mmu_invalidate_seq: found before the invalidation, to be installed after it."""
    one = make()
    turns = []

    def invalidate_once():
        if not turns:
            turns.append(1)
            one.vm.invalidate_range_start(HVA, HVA + 0x1000)
            one.vm.invalidate_range_end(HVA, HVA + 0x1000)

    one.mm.in_gup = invalidate_once
    assert one.fault(0, WRITE) == RetPf.RETRY
    assert one.stage.sptes == {}
    one.mm.present.clear()
    assert one.fault(0, WRITE) == RetPf.FIXED


def test_nothing_is_installed_while_an_invalidation_is_in_progress(make):
    one = make()
    one.mm.present = one.mm.writable = {HVA, HVA + 0x1000}
    assert one.fault(0) == RetPf.FIXED
    one.vm.invalidate_range_start(HVA, HVA + 0x1000)
    assert one.stage.sptes == {}
    one.vm.invalidate_range_start(HVA + 0x8000, HVA + 0x9000)
    assert one.fault(0) == RetPf.RETRY
    one.vm.invalidate_range_end(HVA, HVA + 0x1000)
    assert one.fault(0) == RetPf.RETRY  # the other one still is
    one.vm.invalidate_range_end(HVA + 0x8000, HVA + 0x9000)
    assert one.fault(0) == RetPf.FIXED


def test_a_slot_deleted_in_the_middle_of_gup(make):
    one = make()
    one.mm.in_gup = lambda: one.vm.set_user_memory_region(0, 0, 0, 0)
    assert one.fault(0, WRITE) == RetPf.RETRY
    assert one.stage.sptes == {}
    assert one.fault(0) == RetPf.EMULATE


def test_an_invalidation_zaps_its_range_and_no_more(make):
    one = make()
    one.mm.present = one.mm.writable = {HVA + (i << 12) for i in range(NPAGES)}
    for gfn in range(NPAGES):
        one.fault(gfn)
    one.vm.invalidate_range_start(HVA + 0x2800, HVA + 0x5001)
    one.vm.invalidate_range_end(HVA + 0x2800, HVA + 0x5001)
    assert set(range(NPAGES)) - one.stage.sptes.keys() == {2, 3, 4, 5}
    one.vm.invalidate_range_start(0, HVA)
    one.vm.invalidate_range_end(0, HVA)
    assert len(one.stage.sptes) == NPAGES - 4


def test_a_prefetch_is_not_counted_as_the_guest_s(make):
    one = make()
    one.mm.present = one.mm.writable = {HVA}
    assert one.fault(0, prefetch=True) == RetPf.FIXED
    assert one.fault(0, prefetch=True) == RetPf.SPURIOUS
    stat = one.vcpu.stat
    assert (stat.pf_taken, stat.pf_fixed, stat.pf_spurious) == (0, 1, 0)


def test_slots_that_share_memory_are_both_zapped(make):
    one = make()
    one.vm.set_user_memory_region(1, 0x10_0000, 0x2000, HVA)
    one.mm.present = one.mm.writable = {HVA}
    one.fault(0)
    one.fault(0x100)
    one.vm.invalidate_range_start(HVA, HVA + 1)
    assert one.stage.sptes == {}
    one.vm.invalidate_range_end(HVA, HVA + 1)


def test_hva_of_a_gfn():
    assert KvmMemorySlot(0, 0x100, 4, HVA, 0).hva_of_gfn(0x102) == HVA + 0x2000
