"""guest_memfd: what a slot may be bound to, and what becomes of it when the file is closed.

What is refused is asked of this machine's KVM too, where that has it: the errno must be the same.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator

import pytest

from guestfault.errors import KvmError, Unavailable
from guestfault.kvm import KvmSystem
from guestfault.kvm.vm import KvmVm
from guestfault.softkvm.system import SoftSystem
from guestfault.softkvm.vm import SoftVm
from guestfault.uapi import kvm as uapi

PAGE = 4096
SIZE = 8 * PAGE
GMEM = uapi.KVM_MEM_GUEST_MEMFD
MMAP, INIT_SHARED = uapi.GUEST_MEMFD_FLAG_MMAP, uapi.GUEST_MEMFD_FLAG_INIT_SHARED
DEFAULT, PROTECTED = uapi.KVM_X86_DEFAULT_VM, uapi.KVM_X86_SW_PROTECTED_VM
VMS = [
    ("linux-6.8", DEFAULT),
    ("linux-6.8", PROTECTED),
    ("linux-7.3", DEFAULT),
    ("linux-7.3", PROTECTED),
]


@pytest.fixture
def opened() -> Iterator[list[SoftSystem | SoftVm]]:
    made: list[SoftSystem | SoftVm] = []
    yield made
    for one in reversed(made):
        one.close()


@pytest.fixture(params=["softkvm", "/dev/kvm"])
def any_vm_of(request, opened, vm_of):
    """The same on either KVM; the real one is like linux-7.3, or the test is skipped."""
    if request.param == "softkvm":
        return vm_of

    def create(dialect: str = "linux-7.3", kind: int = PROTECTED) -> KvmVm:
        try:
            system = KvmSystem()
        except Unavailable as why:
            pytest.skip(f"no usable /dev/kvm: {why}")
        opened.append(system)
        flags = system.check_extension(uapi.KVM_CAP_GUEST_MEMFD_FLAGS)
        types = system.check_extension(uapi.KVM_CAP_VM_TYPES)
        if flags != MMAP | INIT_SHARED or dialect != "linux-7.3" or not types >> kind & 1:
            pytest.skip("needs a guest_memfd that can be mapped, and the type of VM")
        vm = system.create_vm(kind)
        opened.append(vm)
        return vm

    return create


@pytest.fixture
def vm_of(opened: list[SoftSystem | SoftVm]):
    def create(dialect: str = "linux-7.3", kind: int = PROTECTED, *, npt: bool = True) -> SoftVm:
        system = SoftSystem(dialect, tdp_enabled=npt)
        opened.append(system)
        vm = system.create_vm(kind)
        opened.append(vm)
        return vm

    return create


def bind(
    vm: SoftVm, fd: int, *, slot: int = 1, gpa: int = 0, size: int = SIZE, **more: int
) -> None:
    flags = more.pop("flags", GMEM)
    vm.set_user_memory_region2(slot, gpa, size, 0, flags, fd, more.pop("offset", 0))


def refused(number: int, call, *args, **more) -> None:
    with pytest.raises(KvmError) as caught:
        call(*args, **more)
    assert caught.value.errno == number, caught.value


# -- what there is -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dialect", "kind", "expected"),
    # GUEST_MEMFD, MEMORY_ATTRIBUTES, GUEST_MEMFD_FLAGS: of a VM, or of the system.
    [
        ("linux-6.8", None, (1, 8, 0)),
        ("linux-6.8", DEFAULT, (0, 0, 0)),
        ("linux-6.8", PROTECTED, (1, 8, 0)),
        ("linux-7.3", None, (1, 8, 3)),
        ("linux-7.3", DEFAULT, (1, 0, 3)),
        ("linux-7.3", PROTECTED, (1, 8, 1)),
        ("seed", None, (0, 0, 0)),
        ("v7", DEFAULT, (0, 0, 0)),
    ],
)
def test_the_capabilities_are_those_of_the_type_of_vm(vm_of, dialect, kind, expected):
    asked = SoftSystem(dialect) if kind is None else vm_of(dialect, kind)
    caps = (
        uapi.KVM_CAP_GUEST_MEMFD,
        uapi.KVM_CAP_MEMORY_ATTRIBUTES,
        uapi.KVM_CAP_GUEST_MEMFD_FLAGS,
    )
    assert tuple(asked.check_extension(cap) for cap in caps) == expected
    if kind is None:
        asked.close()


@pytest.mark.parametrize(
    ("dialect", "npt", "types"),
    [
        ("linux-6.8", True, 3),
        ("linux-6.8", False, 1),
        ("linux-7.3", True, 3),
        ("linux-7.3", False, 1),
        ("seed", True, 0),
    ],
)
def test_private_memory_takes_nested_paging(dialect, npt, types):
    system = SoftSystem(dialect, tdp_enabled=npt)
    assert system.check_extension(uapi.KVM_CAP_VM_TYPES) == types
    for kind in (uapi.KVM_X86_SNP_VM, -1, 70) + (() if types == 3 else (PROTECTED,)):
        refused(errno.EINVAL, system.create_vm, kind)
    system.close()


def test_other_dialects_do_not_have_the_ioctls(vm_of):
    vm = vm_of("v7", DEFAULT)
    refused(errno.ENOTTY, vm.create_guest_memfd, SIZE)
    refused(errno.ENOTTY, vm.set_memory_attributes, 0, PAGE, 0)
    refused(errno.ENOTTY, vm.set_user_memory_region2, 0, 0, SIZE, 0x10000)
    with_bitmaps = vm_of("userfault-v3", DEFAULT)
    with_bitmaps.set_user_memory_region2(0, 0, SIZE, 0x10000)
    refused(errno.EINVAL, bind, with_bitmaps, 0)


# -- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dialect", "kind"), VMS)
def test_flags_and_sizes_of_a_file(any_vm_of, dialect, kind):
    vm = any_vm_of(dialect, kind)
    allowed = 0
    if dialect == "linux-7.3":
        allowed = MMAP if kind == PROTECTED else MMAP | INIT_SHARED
    for flags in (0, MMAP, INIT_SHARED, MMAP | INIT_SHARED, 4):
        if flags & ~allowed:
            refused(errno.EINVAL, vm.create_guest_memfd, SIZE, flags)
        else:
            os.close(vm.create_guest_memfd(SIZE, flags))
    for size in (0, -PAGE, 1, SIZE + 1, 1 << 63):
        refused(errno.EINVAL, vm.create_guest_memfd, size)


@pytest.mark.parametrize("kind", [DEFAULT, PROTECTED])
def test_what_is_no_guest_memfd_of_this_vm(any_vm_of, kind):
    vm, other = any_vm_of(kind=kind), any_vm_of(kind=kind)
    fd, stray = other.create_guest_memfd(SIZE), os.memfd_create("stray")
    refused(errno.EINVAL, bind, vm, fd)
    refused(errno.EINVAL, bind, vm, stray)
    os.close(stray)
    refused(errno.EBADF, bind, vm, stray)
    bind(other, fd)
    os.close(fd)


@pytest.mark.parametrize("kind", [DEFAULT, PROTECTED])
def test_a_part_of_the_file_that_is_there_and_free(any_vm_of, kind):
    vm = any_vm_of(kind=kind)
    fd = vm.create_guest_memfd(SIZE)
    refused(errno.EINVAL, bind, vm, fd, offset=PAGE)  # ends past the end
    refused(errno.EINVAL, bind, vm, fd, size=PAGE, offset=1)
    refused(errno.EINVAL, bind, vm, fd, size=PAGE, offset=SIZE)
    bind(vm, fd, size=2 * PAGE, offset=2 * PAGE)
    for first in (1, 2, 3):
        refused(errno.EINVAL, bind, vm, fd, slot=2, gpa=SIZE, size=2 * PAGE, offset=first * PAGE)
    refused(errno.EEXIST, bind, vm, fd, slot=2, gpa=PAGE, size=2 * PAGE, offset=4 * PAGE)  # the gpa
    bind(vm, fd, slot=2, gpa=SIZE, size=2 * PAGE)
    bind(vm, fd, slot=3, gpa=2 * SIZE, size=2 * PAGE, offset=4 * PAGE)
    vm.set_user_memory_region(1, 0, 0, 0)
    bind(vm, fd, slot=4, gpa=3 * SIZE, size=2 * PAGE, offset=2 * PAGE)  # free again
    os.close(fd)


@pytest.mark.parametrize(("dialect", "kind"), VMS)
def test_the_flags_of_a_slot(any_vm_of, dialect, kind):
    vm = any_vm_of(dialect, kind)
    if dialect == "linux-6.8" and kind == DEFAULT:
        fd = vm.create_guest_memfd(SIZE)  # which is of no use
        refused(errno.EINVAL, bind, vm, fd)
        os.close(fd)
        return
    fd = vm.create_guest_memfd(SIZE)
    for more in (uapi.KVM_MEM_LOG_DIRTY_PAGES, uapi.KVM_MEM_READONLY, 8):
        refused(errno.EINVAL, bind, vm, fd, flags=GMEM | more)
    refused(errno.EINVAL, vm.set_user_memory_region, 1, 0, SIZE, 0x10000, GMEM)  # the old ioctl
    bind(vm, fd)
    refused(errno.EINVAL, bind, vm, fd)  # as it is
    refused(errno.EINVAL, bind, vm, fd, gpa=SIZE)  # elsewhere
    refused(errno.EINVAL, bind, vm, fd, flags=0)  # without
    vm.set_user_memory_region2(2, 2 * SIZE, SIZE, 0x10000)
    refused(errno.EINVAL, bind, vm, fd, slot=2, gpa=2 * SIZE)  # for one that has none
    vm.set_user_memory_region2(1, 0, 0, 0, GMEM)
    os.close(fd)


# -- its end -------------------------------------------------------------------------------------


def test_a_file_that_is_closed_cannot_be_bound_and_is_let_go_of(vm_of):
    vm = vm_of()
    fd = vm.create_guest_memfd(SIZE)
    copy = os.dup(fd)
    os.close(fd)
    bind(vm, copy)
    assert len(vm.kvm.gmems) == 1
    os.close(copy)
    refused(errno.EBADF, bind, vm, copy, slot=2, gpa=SIZE)
    other = vm.create_guest_memfd(SIZE)
    bind(vm, other, slot=2, gpa=SIZE)  # looks after the other on the way
    [gone, there] = vm.kvm.gmems
    assert gone.released
    assert not there.released
    assert vm.kvm.memslots.by_id(1).gmem.file is None
    vm.set_user_memory_region(1, 0, 0, 0)
    assert vm.kvm.gmems == [there]
    vm.set_user_memory_region(2, SIZE, 0, 0)
    assert vm.kvm.gmems == [there], "userspace still has it"
    os.close(other)


def test_what_is_mapped_from_it_is_zapped_with_the_release(vm_of):
    from guestfault.softkvm.guest_memfd import kvm_gmem_get_pfn, kvm_gmem_release_closed

    vm = vm_of()
    fd = vm.create_guest_memfd(SIZE)
    bind(vm, fd)
    slot, sptes = vm.kvm.memslots.by_id(1), vm.kvm.second_stage.sptes
    r, pfn = kvm_gmem_get_pfn(vm.kvm, slot, 3)
    assert (r, pfn << 12) == (0, slot.gmem.address + 3 * PAGE)
    sptes.update({3: pfn << 12 | 1, SIZE // PAGE: 1})
    kvm_gmem_release_closed(vm.kvm)
    assert 3 in sptes
    os.close(fd)
    seq = vm.kvm.second_stage.mmu_invalidate_seq
    assert kvm_gmem_get_pfn(vm.kvm, slot, 4) == (-errno.EFAULT, 0)
    assert set(sptes) == {SIZE // PAGE}
    assert vm.kvm.second_stage.mmu_invalidate_seq > seq
    assert kvm_gmem_get_pfn(vm.kvm, slot, 4) == (-errno.EFAULT, 0)


def test_nothing_is_left_open_when_the_vm_is_closed():
    system = SoftSystem("linux-7.3")
    before = len(os.listdir("/proc/self/fd"))
    vm = system.create_vm(PROTECTED)
    fds = [vm.create_guest_memfd(SIZE) for _ in range(3)]
    bind(vm, fds[0])
    os.close(fds[0])
    vm.close()
    os.close(fds[1])
    os.close(fds[2])
    assert len(os.listdir("/proc/self/fd")) == before
    system.close()
