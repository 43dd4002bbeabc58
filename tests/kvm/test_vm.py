import errno
import os

import pytest

from guestfault.errors import KvmError
from guestfault.fault.outcome import Io, MemoryFault, Mmio
from guestfault.uapi import kvm as uapi

STORE_DATA = bytes.fromhex("89042500000800 e601")  # mov [0x80000], eax; out 1, al
LOAD_HOLE = bytes.fromhex("8b042510002000 ee")  # mov eax, [0x200010]; out dx, al


def refused(call, *args, **kwargs):
    with pytest.raises(KvmError) as caught:
        call(*args, **kwargs)
    return caught.value


def test_unaligned_slot_is_refused_with_its_numbers(machine, layout):
    error = refused(machine.vm.set_user_memory_region, 5, 0x40_0123, 0x1000, machine.guest.address)
    assert (error.call, error.errno) == ("KVM_SET_USER_MEMORY_REGION", errno.EINVAL)
    assert "slot 5, gpa 0x400123, size 0x1000" in str(error)
    assert f"hva {machine.guest.address:#x}" in str(error)


def test_overlapping_slot_is_refused(machine, layout):
    last_page = layout.RAM_SIZE - layout.PAGE
    error = refused(
        machine.vm.set_user_memory_region, 1, last_page, 2 * layout.PAGE, machine.guest.address
    )
    assert error.errno == errno.EEXIST
    assert f"gpa {last_page:#x}" in str(error)


def test_unknown_flags_are_refused(machine, layout):
    error = refused(
        machine.vm.set_user_memory_region, 1, layout.HOLE, 0x1000, machine.guest.address, 1 << 31
    )
    assert error.errno == errno.EINVAL
    assert "flags 0x80000000" in str(error)


def test_deleting_a_slot_makes_room(machine, layout):
    for slot in (1, 2):
        machine.vm.set_user_memory_region(slot, layout.HOLE, 0x1000, machine.guest.address)
        machine.vm.set_user_memory_region(slot, layout.HOLE, 0, machine.guest.address)


def test_slot_with_offset_zero_is_what_the_guest_reads(machine, layout):
    """A slot made by the second ioctl, without a guest_memfd, is an ordinary one."""
    if not machine.vm.check_extension(uapi.KVM_CAP_USER_MEMORY2):
        pytest.skip("this KVM has no KVM_CAP_USER_MEMORY2")
    machine.vm.set_user_memory_region2(
        1, layout.HOLE, layout.PAGE, machine.guest.address + layout.DATA
    )
    machine.write(layout.DATA + 0x10, b"\x2a\0\0\0")
    vcpu = machine.user_vcpu(LOAD_HOLE)
    assert isinstance(machine.run(vcpu), Io)
    assert vcpu.get_regs().rax == 0x2A


def test_dirty_log_has_the_page_written_and_no_other(machine, layout):
    machine.vm.set_user_memory_region(
        0, 0, layout.RAM_SIZE, machine.guest.address, uapi.KVM_MEM_LOG_DIRTY_PAGES
    )
    vcpu = machine.user_vcpu(STORE_DATA)
    machine.vm.get_dirty_log(0)
    assert isinstance(machine.run(vcpu), Io)
    log = int.from_bytes(machine.vm.get_dirty_log(0), "little")
    dirty = {page << 12 for page in range(layout.RAM_SIZE >> 12) if log >> page & 1}
    # KVM may count the tables (accessed bits) and what it mapped writable on a mere read.
    assert {layout.DATA} <= dirty <= {layout.DATA, layout.CODE, 0x1000, 0x2000, 0x3000}
    assert machine.vm.get_dirty_log(0) == bytes(layout.RAM_SIZE // layout.PAGE // 8)


@pytest.mark.parametrize("slot", [0, 9])
def test_no_dirty_log_without_the_flag(machine, slot):
    error = refused(machine.vm.get_dirty_log, slot)
    assert (error.call, error.errno, error.detail) == (
        "KVM_GET_DIRTY_LOG",
        errno.ENOENT,
        f"slot {slot}",
    )


def test_unknown_capability_cannot_be_enabled(vm):
    error = refused(vm.enable_cap, 99_999, (1, 2))
    assert error.errno == errno.EINVAL
    assert "capability 99999, args (1, 2)" in str(error)


def test_capability_that_takes_effect(vm):
    """With room for one vCPU id only, the second is refused: the arguments arrived."""
    if not vm.check_extension(uapi.KVM_CAP_MAX_VCPU_ID):
        pytest.skip("this KVM has no KVM_CAP_MAX_VCPU_ID")
    vm.enable_cap(uapi.KVM_CAP_MAX_VCPU_ID, (1,))
    vm.create_vcpu(0)
    assert refused(vm.create_vcpu, 1).errno == errno.EINVAL


def test_vcpu_id_that_is_taken(vm):
    vm.create_vcpu(3)
    error = refused(vm.create_vcpu, 3)
    assert (error.errno, error.detail) == (errno.EEXIST, "vCPU 3")


@pytest.fixture
def gmem_slot(machine, layout):
    """A page of guest_memfd in the hole; the file descriptor."""
    flags = uapi.GUEST_MEMFD_FLAG_MMAP | uapi.GUEST_MEMFD_FLAG_INIT_SHARED
    if machine.vm.check_extension(uapi.KVM_CAP_GUEST_MEMFD_FLAGS) & flags != flags:
        pytest.skip("this KVM has no guest_memfd with MMAP and INIT_SHARED")
    fd = machine.vm.create_guest_memfd(layout.PAGE, flags)
    machine.vm.set_user_memory_region2(
        1,
        layout.HOLE,
        layout.PAGE,
        machine.guest.address,
        uapi.KVM_MEM_GUEST_MEMFD,
        fd,
    )
    return fd


def test_guest_memfd_backs_its_slot(machine, gmem_slot):
    vcpu = machine.user_vcpu(LOAD_HOLE)
    vcpu.set_regs(uapi.kvm_regs(rip=vcpu.get_regs().rip, rflags=0x3002, rax=7))
    assert isinstance(machine.run(vcpu), Io)
    assert vcpu.get_regs().rax == 0
    os.close(gmem_slot)


def test_guest_memfd_gone_is_an_annotated_fault(machine, layout, gmem_slot):
    os.close(gmem_slot)
    vcpu = machine.user_vcpu(LOAD_HOLE)
    assert machine.run(vcpu) == MemoryFault(layout.HOLE, layout.PAGE, 0, errno.EFAULT)
    assert vcpu.get_regs().rip == layout.CODE
    # The stale annotation of the last run is not believed after a success.
    machine.vm.set_user_memory_region2(1, layout.HOLE, 0, 0)
    assert machine.run(vcpu) == Mmio(layout.HOLE + 0x10, b"", 4, False)


def test_guest_memfd_refused_with_its_numbers(vm):
    error = refused(vm.create_guest_memfd, 0x123, 0)
    if error.errno == errno.ENOTTY:
        pytest.skip("this KVM has no guest_memfd")
    assert (error.errno, error.detail) == (errno.EINVAL, "0x123 bytes, flags 0x0")


def test_an_ordinary_vm_has_no_memory_attributes(machine, layout):
    private = uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE
    assert machine.vm.check_extension(uapi.KVM_CAP_MEMORY_ATTRIBUTES) == 0
    error = refused(machine.vm.set_memory_attributes, 0, layout.RAM_SIZE, private)
    assert error.errno in (errno.EINVAL, errno.ENOTTY)
    assert "[0x0, 0x200000), attributes 0x8" in str(error)


def test_a_protected_vm_has_them(system, layout):
    kind, private = uapi.KVM_X86_SW_PROTECTED_VM, uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE
    if not system.check_extension(uapi.KVM_CAP_VM_TYPES) >> kind & 1:
        error = refused(system.create_vm, kind)
        assert (error.call, error.errno) == ("KVM_CREATE_VM", errno.EINVAL)
        return
    vm = system.create_vm(kind)
    assert vm.check_extension(uapi.KVM_CAP_MEMORY_ATTRIBUTES) == private
    vm.set_memory_attributes(0, layout.RAM_SIZE, private)
    vm.set_memory_attributes(layout.PAGE, layout.PAGE, 0)
    assert refused(vm.set_memory_attributes, 0x123, layout.PAGE, private).errno == errno.EINVAL
    assert refused(vm.set_memory_attributes, 0, layout.PAGE, 1).errno == errno.EINVAL
    vm.close()


# -- what was never merged -------------------------------------------------------------------------


def test_a_released_kernel_has_no_such_switch(machine):
    error = refused(machine.vm.set_mem_fault_nowait, True)
    assert (error.call, error.errno) == ("KVM_SET_MEM_FAULT_NOWAIT", errno.ENOTTY)


def test_a_released_kernel_knows_no_userfault_bitmap(machine, layout):
    if not machine.vm.check_extension(uapi.KVM_CAP_USER_MEMORY2):
        pytest.skip("needs KVM_SET_USER_MEMORY_REGION2 (Linux 6.8)")
    slot = (1, layout.HOLE, 0x1000, machine.guest.address)
    bitmap = machine.guest.address
    error = refused(machine.vm.set_user_memory_region, *slot, 1 << 3, userfault_bitmap=bitmap)
    assert (error.call, error.errno) == ("KVM_SET_USER_MEMORY_REGION2", errno.EINVAL)
    assert f"userfault_bitmap {bitmap:#x}" in str(error)
    # Without the flag it is padding, which is not looked at.
    machine.vm.set_user_memory_region(*slot, userfault_bitmap=bitmap)
