"""Causes in private memory, made to happen to a vCPU of a KVM_X86_SW_PROTECTED_VM.

On most machines these are skipped: ``scripts/lab-tests.py`` runs them on a kernel that
``scripts/sw-protected-kernel.sh`` has built.
"""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from guestfault.fault.access import AccessKind
from guestfault.fault.cause.record import Kind, Remedy
from guestfault.fault.outcome import Io, MemoryFault
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.memory.slots import MemorySlot, SlotMap
from guestfault.uapi import kvm as uapi

from .conftest import TARGET, Machine

PAGE = 4096
SIZE = 4 * PAGE
READ, WRITE = AccessKind.READ, AccessKind.WRITE
PRIVATE = uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE
CONTENT = 0x0123456789ABCDEF
FAULT = MemoryFault(TARGET, PAGE, uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE, errno.EFAULT)


@dataclass
class Shared:
    """What is behind the slot where it is shared: ``CONTENT`` in the first page."""

    machine: Machine
    mapping: Mapping

    def bind(self, guest_memfd: int | None) -> None:
        """Set the slot anew, with that file or without one."""
        self.unbind()
        flags = 0 if guest_memfd is None else uapi.KVM_MEM_GUEST_MEMFD
        where = TARGET, SIZE, self.mapping.address
        self.machine.vm.set_user_memory_region2(1, *where, flags, guest_memfd=guest_memfd or 0)
        self.machine.slots.add(MemorySlot(TARGET, SIZE, self.mapping.address, 1, flags))

    def unbind(self) -> None:
        """Delete the slot, if it is there."""
        if self.machine.slots.find(TARGET) is not None:
            self.machine.vm.set_user_memory_region(1, TARGET, 0, 0)
            self.machine.slots = SlotMap()

    @property
    def seen(self) -> int:
        """What the guest has read."""
        return int(self.machine.vcpu.get_regs().rax)


@pytest.fixture
def shared(protected_machine: Any) -> Iterator[Shared]:
    with Memfd("shared", SIZE) as file, Mapping.from_memfd(file) as mapping:
        mapping.view()[:8] = CONTENT.to_bytes(8, "little")
        yield Shared(protected_machine, mapping)
        protected_machine.vm.close()


def test_no_guest_memfd_to_be_private_in(shared: Shared) -> None:
    machine = shared.machine
    shared.bind(None)
    machine.vm.set_memory_attributes(TARGET, PAGE, PRIVATE)
    assert machine.access(READ) == FAULT
    (cause,) = machine.causes(FAULT, attributes=PRIVATE)
    assert (cause.kind, cause.by) == (Kind.NO_GUEST_MEMFD, Remedy.ADD_GUEST_MEMFD)
    assert machine.access(READ) == FAULT
    fd = machine.vm.create_guest_memfd(SIZE)
    shared.bind(fd)
    assert machine.completes()
    assert shared.seen == 0  # another memory than the shared one, and empty
    os.close(fd)


def test_the_private_guest_memfd_is_gone(shared: Shared) -> None:
    machine = shared.machine
    fd = machine.vm.create_guest_memfd(SIZE)
    shared.bind(fd)
    machine.vm.set_memory_attributes(TARGET, PAGE, PRIVATE)
    os.close(fd)
    assert machine.access(WRITE) == FAULT
    (cause,) = machine.causes(FAULT, attributes=PRIVATE)
    assert (cause.kind, cause.by, cause.certain) == (Kind.GUEST_MEMFD_GONE, Remedy.NONE, True)
    either = machine.causes(FAULT)
    assert [cause.kind for cause in either] == [Kind.PRIVATE_MISMATCH, Kind.GUEST_MEMFD_GONE]
    assert not any(cause.certain for cause in either)
    # The rest of the slot is shared, and does not need the file.
    assert isinstance(machine.access(WRITE, PAGE), Io)


def test_private_where_no_slot_is(shared: Shared) -> None:
    machine = shared.machine
    machine.vm.set_memory_attributes(TARGET, PAGE, PRIVATE)
    assert machine.access(READ) == FAULT  # a fault, and no MMIO
    machine.vm.set_memory_attributes(TARGET, PAGE, 0)
    shared.bind(None)
    assert machine.completes()
    assert shared.seen == CONTENT


def test_conversion_goes_between_two_memories(shared: Shared) -> None:
    machine = shared.machine
    fd = machine.vm.create_guest_memfd(SIZE)
    shared.bind(fd)
    written = 0x1122334455667788  # what Machine.access writes
    for attributes, before in ((PRIVATE, 0), (0, CONTENT), (PRIVATE, written), (0, written)):
        machine.vm.set_memory_attributes(TARGET, PAGE, attributes)
        assert isinstance(machine.access(READ), Io)
        assert shared.seen == before
        assert isinstance(machine.access(WRITE), Io)
    os.close(fd)


@pytest.mark.timeout(120)
def test_a_conversion_under_way_is_a_mismatch_both_ways(shared: Shared) -> None:
    """Invariant: what a vCPU meets while another thread converts its page, a retry cures.

    KVM reads the attribute as the fault begins and again before it takes a page.  If it has changed
    in between, that is a mismatch, in the direction of the change, though nobody asked for
    anything.
    """
    machine = shared.machine
    fd = machine.vm.create_guest_memfd(SIZE)
    shared.bind(fd)
    stop = threading.Event()

    def convert() -> None:
        while not stop.is_set():
            machine.vm.set_memory_attributes(TARGET, PAGE, PRIVATE)
            machine.vm.set_memory_attributes(TARGET, PAGE, 0)

    thread = threading.Thread(target=convert)
    thread.start()
    wanted = {0, uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE}
    seen: set[int] = set()
    try:
        while seen != wanted:
            said = machine.access(READ)
            if isinstance(said, MemoryFault):
                assert said == MemoryFault(TARGET, PAGE, said.flags, errno.EFAULT)
                assert said.flags in wanted
                # As the VMM that converts knows it: the attribute is not what the exit says.
                now = PRIVATE ^ said.flags
                (cause,) = machine.causes(said, attributes=now)
                assert (cause.kind, cause.by) == (Kind.PRIVATE_MISMATCH, Remedy.CONVERT)
                assert "run the vCPU again" in cause.how
                seen.add(said.flags)
    finally:
        stop.set()
        thread.join()
    assert isinstance(machine.access(READ), Io)
    assert shared.seen == CONTENT
    os.close(fd)
