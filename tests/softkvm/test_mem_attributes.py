"""KVM_SET_MEMORY_ATTRIBUTES: what is refused, and that a change is an invalidation."""

from __future__ import annotations

import errno

import pytest
from tests.softkvm.modelled_mm import NPAGES, At

from guestfault.dialect.published import LINUX_6_8, LINUX_7_3
from guestfault.errors import KvmError, Unavailable
from guestfault.kvm import KvmSystem
from guestfault.softkvm.kvm_host import Request, vcpu_put
from guestfault.softkvm.mem_attributes import kvm_get_memory_attributes, kvm_mem_is_private
from guestfault.softkvm.preempt import scheduled_by
from guestfault.softkvm.second_stage import PT_READ
from guestfault.uapi import kvm as uapi

PAGE = 4096
PRIVATE = uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE
PROTECTED = uapi.KVM_X86_SW_PROTECTED_VM


@pytest.fixture(params=[LINUX_6_8, LINUX_7_3], ids=["linux-6.8", "linux-7.3"])
def one(make, request):
    return make(request.param, vm_type=PROTECTED)


REFUSED = [
    (0, PAGE, 1),
    (0, PAGE, PRIVATE | 1),
    (0, 0, PRIVATE),
    (0, PAGE - 1, PRIVATE),
    (1, PAGE, PRIVATE),
    (-PAGE, PAGE, PRIVATE),
    ((1 << 64) - PAGE, PAGE, PRIVATE),  # ends at 0
    (PAGE, (1 << 64) - PAGE, PRIVATE),
]


@pytest.mark.parametrize(("address", "size", "attributes"), REFUSED)
def test_what_is_refused(one, address, size, attributes):
    with pytest.raises(KvmError, match="KVM_SET_MEMORY_ATTRIBUTES") as caught:
        one.vm.set_memory_attributes(address, size, attributes)
    assert caught.value.errno == errno.EINVAL


def test_this_machines_kvm_refuses_the_same(request):
    """In a VM with private memory if there is one, else in an ordinary one."""
    try:
        system = KvmSystem()
    except Unavailable as why:
        pytest.skip(f"no usable /dev/kvm: {why}")
    types = max(system.check_extension(uapi.KVM_CAP_VM_TYPES), 0)
    vm = system.create_vm(PROTECTED if types >> PROTECTED & 1 else uapi.KVM_X86_DEFAULT_VM)
    request.addfinalizer(system.close)
    request.addfinalizer(vm.close)
    if not system.check_extension(uapi.KVM_CAP_MEMORY_ATTRIBUTES) and not types >> PROTECTED & 1:
        pytest.skip("needs a kernel with memory attributes")
    for asked in REFUSED:
        with pytest.raises(KvmError) as caught:
            vm.set_memory_attributes(*asked)
        assert caught.value.errno == errno.EINVAL, asked


def test_a_vm_without_private_memory_takes_no_attributes_but_none(make):
    one = make(LINUX_7_3)
    with pytest.raises(KvmError, match="EINVAL"):
        one.vm.set_memory_attributes(0, PAGE, PRIVATE)
    one.vm.set_memory_attributes(0, PAGE, 0)


def test_a_range_has_them_to_the_page_and_slots_do_not_matter(one):
    one.vm.set_memory_attributes(PAGE, 2 * PAGE, PRIVATE)
    one.vm.set_memory_attributes(1 << 40, 1 << 40, PRIVATE)
    found = [gfn for gfn in range(NPAGES) if kvm_mem_is_private(one.kvm, gfn)]
    assert found == [1, 2]
    assert kvm_get_memory_attributes(one.kvm, (1 << 41 >> 12) - 1) == PRIVATE
    assert kvm_get_memory_attributes(one.kvm, 1 << 41 >> 12) == 0
    one.vm.set_memory_attributes(2 * PAGE, PAGE, 0)
    assert not kvm_mem_is_private(one.kvm, 2)


def test_what_is_mapped_is_zapped_before_and_faults_are_held_off_until_after(one):
    stage = one.stage
    stage.sptes.update(dict.fromkeys(range(NPAGES), 4096 | PT_READ))
    vcpu_put()
    during: list[tuple[set[int], bool, bool]] = []

    def store() -> None:
        held = stage.mmu_invalidate_retry(stage.mmu_invalidate_seq, 0, 2)
        other = stage.mmu_invalidate_retry(stage.mmu_invalidate_seq, 0, 4)
        during.append((set(stage.sptes), held, other))
        assert Request.TLB_FLUSH in one.vcpu.requests

    seq = stage.mmu_invalidate_seq
    with scheduled_by(At(**{"kvm_vm_set_mem_attributes: store them": store})):
        one.vm.set_memory_attributes(PAGE, 3 * PAGE, PRIVATE)
    assert during == [(set(range(NPAGES)) - {1, 2, 3}, True, False)]
    assert not stage.mmu_invalidate_in_progress
    assert stage.mmu_invalidate_seq == seq + 1


def test_attributes_that_are_there_already_disturb_nobody(one):
    one.vm.set_memory_attributes(0, 4 * PAGE, PRIVATE)
    seq = one.stage.mmu_invalidate_seq
    one.stage.sptes[1] = 0x1000 | PT_READ
    one.vm.set_memory_attributes(PAGE, PAGE, PRIVATE)
    assert one.stage.mmu_invalidate_seq == seq
    assert 1 in one.stage.sptes


def test_where_no_slot_is_nobody_is_held_off(one):
    seq = one.stage.mmu_invalidate_seq
    one.vm.set_memory_attributes(NPAGES * PAGE, PAGE, PRIVATE)
    assert one.stage.mmu_invalidate_seq == seq
    assert kvm_mem_is_private(one.kvm, NPAGES)


def test_not_in_the_midst_of_the_threads_own_run(one):
    one.vcpu.srcu_seq |= 1  # in KVM_RUN, and this thread has it loaded
    with pytest.raises(KvmError) as caught:
        one.vm.set_memory_attributes(0, PAGE, PRIVATE)
    assert caught.value.errno == errno.EDEADLK
    one.vcpu.srcu_seq += 1
