"""Causes in private memory, made to happen to a vCPU of a KVM_X86_SW_PROTECTED_VM.

On most machines only the software KVM has one: ``scripts/lab-tests.py`` runs them on a kernel that
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
from guestfault.fault.outcome import Io, MemoryFault, Mmio, RamMmio
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.memory.slots import MemorySlot, SlotMap
from guestfault.softkvm import mmu
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.mmu_internal import KvmPageFault
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


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    "protected_machine", ["softkvm linux-6.8", "softkvm linux-7.3"], indirect=True
)
@pytest.mark.parametrize("then", [PRIVATE, 0], ids=["to-private", "to-shared"])
def test_the_mismatch_tells_what_was(
    shared: Shared, then: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Invariant: a fault in the midst of which its page is converted is cured by a retry alone.

    Whoever converts to what the exit says undoes the conversion of the other thread.
    """
    machine = shared.machine
    fd = machine.vm.create_guest_memfd(SIZE)
    shared.bind(fd)
    machine.vm.set_memory_attributes(TARGET, PAGE, PRIVATE ^ then)
    direct_page_fault = mmu.direct_page_fault

    def convert() -> None:
        machine.vm.set_memory_attributes(TARGET, PAGE, then)

    def converted_first(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
        if fault.gfn == TARGET // PAGE:
            monkeypatch.undo()
            thread = threading.Thread(target=convert)
            thread.start()
            thread.join()
        return direct_page_fault(vcpu, fault)

    monkeypatch.setattr(mmu, "direct_page_fault", converted_first)
    said = machine.access(READ)
    assert said == MemoryFault(TARGET, PAGE, PRIVATE ^ then, errno.EFAULT)
    (cause,) = machine.causes(said, attributes=then)
    assert (cause.kind, cause.by) == (Kind.PRIVATE_MISMATCH, Remedy.CONVERT)
    assert "run the vCPU again" in cause.how
    assert machine.completes()
    assert shared.seen == (0 if then else CONTENT)
    os.close(fd)


@pytest.mark.timeout(60)
def test_conversions_under_a_vcpu_that_goes_on(shared: Shared) -> None:
    """Invariant: what a vCPU reads is in the one memory or in the other; a mismatch, it retries."""
    machine = shared.machine
    fd = machine.vm.create_guest_memfd(SIZE)
    shared.bind(fd)
    stop = threading.Event()

    def convert() -> None:
        while not stop.wait(0.0005):
            machine.vm.set_memory_attributes(TARGET, PAGE, PRIVATE)
            stop.wait(0.0005)
            machine.vm.set_memory_attributes(TARGET, PAGE, 0)

    thread = threading.Thread(target=convert)
    thread.start()
    seen: set[int] = set()
    accesses = 0
    try:
        while accesses < 200 or len(seen) < 2:
            accesses += 1
            said = machine.access(READ)
            if isinstance(said, MemoryFault):
                assert (said.gpa, said.size, said.errno) == (TARGET, PAGE, errno.EFAULT)
            else:
                assert isinstance(said, Io)
                seen.add(shared.seen)
    finally:
        stop.set()
        thread.join()
    assert seen == {0, CONTENT}, "one memory or the other, and no third content"
    os.close(fd)


@pytest.mark.timeout(120)
@pytest.mark.parametrize("protected_machine", ["/dev/kvm"], indirect=True)
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


@pytest.mark.parametrize("protected_machine", ["softkvm linux-7.3", "/dev/kvm"], indirect=True)
def test_private_memory_where_a_device_was(shared: Shared) -> None:
    """The entry that says "no memory" outlives attribute and slot, and its faults are shared ones.

    What the exit asks for has the access made, to the wrong memory; and so the entry replaced.
    """
    machine = shared.machine
    assert isinstance(machine.access(READ), Mmio | RamMmio)
    assert machine.completes()
    machine.vm.set_memory_attributes(TARGET, PAGE, PRIVATE)
    fd = machine.vm.create_guest_memfd(SIZE)
    shared.bind(fd)
    mismatch = MemoryFault(TARGET, PAGE, 0, errno.EFAULT)
    for _ in range(3):
        assert machine.access(READ) == mismatch
    (cause,) = machine.causes(mismatch, attributes=PRIVATE)
    assert cause.kind == Kind.PRIVATE_MISMATCH
    shared.bind(fd)
    assert machine.access(READ) == mismatch
    machine.vm.set_memory_attributes(TARGET, PAGE, 0)
    assert isinstance(machine.access(READ), Io)
    assert shared.seen == CONTENT
    machine.vm.set_memory_attributes(TARGET, PAGE, PRIVATE)
    assert isinstance(machine.access(READ), Io)
    assert shared.seen == 0
    os.close(fd)
