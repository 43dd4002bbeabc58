"""Causes in a guest_memfd, made to happen to a vCPU, and in poisoned memory, to one of /dev/kvm."""

from __future__ import annotations

import ctypes
import errno
import os
import signal

import pytest

from guestfault.fault.access import AccessKind
from guestfault.fault.cause.record import Kind, Remedy
from guestfault.fault.outcome import Interrupted, Io, MemoryFault
from guestfault.linux.ioctl import call, libc
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.linux.userfaultfd import Feature, Mode, Userfaultfd
from guestfault.memory.slots import MemorySlot
from guestfault.uapi import kvm as uapi
from guestfault.uapi import mman

PAGE = 4096
READ, WRITE = AccessKind.READ, AccessKind.WRITE
TARGET = 2 << 20
SHARED = uapi.GUEST_MEMFD_FLAG_MMAP | uapi.GUEST_MEMFD_FLAG_INIT_SHARED


def bind(machine, guest_memfd: int, size: int) -> None:
    machine.vm.set_user_memory_region2(
        1, TARGET, size, 0, uapi.KVM_MEM_GUEST_MEMFD, guest_memfd=guest_memfd
    )


def test_guest_memfd_gone(machine_with_guest_memfd):
    machine = machine_with_guest_memfd
    has = machine.vm.check_extension
    if has(uapi.KVM_CAP_GUEST_MEMFD_FLAGS) & SHARED != SHARED:
        pytest.skip("needs a guest_memfd of shared memory (KVM_CAP_GUEST_MEMFD_FLAGS)")
    fd = machine.vm.create_guest_memfd(4 * PAGE, SHARED)
    bind(machine, fd, 4 * PAGE)
    machine.slots.add(MemorySlot(TARGET, 4 * PAGE, 0, 1, uapi.KVM_MEM_GUEST_MEMFD))
    assert isinstance(machine.access(WRITE), Io)
    os.close(fd)
    failure = machine.access(READ, PAGE)
    assert failure == MemoryFault(TARGET + PAGE, PAGE, 0, errno.EFAULT)
    known = has(uapi.KVM_CAP_MEMORY_ATTRIBUTES) == 0
    found = machine.causes(failure, attributes=0 if known else None)
    cause = found[0] if known else found[1]
    assert (cause.kind, cause.by, cause.resolvable) == (Kind.GUEST_MEMFD_GONE, Remedy.NONE, False)
    assert cause.certain is known
    assert machine.run() == failure, "it cannot be resolved, and so it is met again"
    # What the account says of a new one is so: the vCPU goes on, with zeros.
    machine.vm.set_user_memory_region2(1, TARGET, 0, 0, uapi.KVM_MEM_GUEST_MEMFD, guest_memfd=0)
    fd = machine.vm.create_guest_memfd(4 * PAGE, SHARED)
    bind(machine, fd, 4 * PAGE)
    assert machine.completes()
    assert machine.vcpu.get_regs().rax == 0
    os.close(fd)


def _poisoned_by_userfaultfd(machine) -> str:
    """The kernel tells the thread by SIGBUS, so this runs in a process of its own."""
    signal.signal(signal.SIGBUS, lambda *_: None)
    uffd = Userfaultfd.open(required=Feature.SIGBUS | Feature.POISON | Feature.MISSING_SHMEM)
    file = Memfd("poisoned", 4 * PAGE)
    guest = Mapping.from_memfd(file)
    uffd.register(guest.address, guest.size, Mode.MISSING)
    machine.back(guest.address, guest.size)
    assert uffd.poison(guest.address, PAGE).done == PAGE
    failure = machine.access(READ)
    assert isinstance(failure, Interrupted), failure  # SIGBUS, BUS_MCEERR_AR
    return str(machine.causes(None)[0].kind)


def test_poison_of_userfaultfd(in_child):
    from .conftest import Machine, open_system

    system = open_system("/dev/kvm")
    system.close()
    try:
        Userfaultfd.open(required=Feature.POISON | Feature.SIGBUS).close()
    except Exception as error:
        pytest.skip(f"needs userfaultfd with UFFDIO_POISON: {error}")
    kind = in_child(lambda: _poisoned_by_userfaultfd(Machine(open_system("/dev/kvm"))))
    if kind == Kind.PRESENT:
        pytest.skip("needs CAP_SYS_ADMIN to see a marker in the pagemap")
    assert kind == Kind.HWPOISON


def _poisoned_for_real(machine) -> tuple[int, str]:
    """One page of a memfd of our own, given up for good (until the machine restarts)."""
    signal.signal(signal.SIGBUS, lambda *_: None)
    file = Memfd("poisoned", PAGE)
    guest = Mapping.from_memfd(file)
    assert guest.populate_write(0, PAGE) == 0
    result = call(libc.madvise, ctypes.c_void_p(guest.address), PAGE, mman.MADV_HWPOISON)
    if result < 0:
        return result, ""
    machine.back(guest.address, PAGE)
    failure = machine.access(READ)
    poisoned = isinstance(failure, Interrupted)
    return 0, f"{poisoned} {machine.causes(None)[0].kind}"


def test_hwpoison(in_child):
    from .conftest import Machine, open_system

    open_system("/dev/kvm").close()
    result, told = in_child(lambda: _poisoned_for_real(Machine(open_system("/dev/kvm"))))
    if result in (-errno.EPERM, -errno.EINVAL):
        why = {errno.EPERM: "CAP_SYS_ADMIN", errno.EINVAL: "CONFIG_MEMORY_FAILURE"}[-result]
        pytest.skip(f"needs {why} for MADV_HWPOISON")
    assert told == f"True {Kind.HWPOISON}"
