"""A page that is made private while an asynchronous page fault on it is under way."""

from __future__ import annotations

import errno
import os
import select
import threading
from typing import Any

import pytest

from guestfault.fault.outcome import BareFault, Io, MemoryFault
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.linux.userfaultfd import Mode, Userfaultfd
from guestfault.linux.userfaultfd_events import PageFault
from guestfault.memory.slots import MemorySlot
from guestfault.uapi import kvm as uapi
from guestfault.uapi.mman import PROT_NONE, PROT_READ

from .conftest import TARGET

PAGE = 4096
SIZE = 4 * PAGE
PRIVATE, GMEM = uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE, uapi.KVM_MEM_GUEST_MEMFD
TWO_LOADS = b"\x48\x8b\x03\x48\x8b\x0a\xe6\x10"  # mov rax, [rbx]; mov rcx, [rdx]; out 0x10, al
CODE = 0x6000
RFLAGS = 0x3202  # interrupts are on, and CPL3 may use ports


def awaited(uffd: Userfaultfd) -> list[Any]:
    poll = select.poll()
    poll.register(uffd.fd, select.POLLIN)
    assert poll.poll(10_000), "nobody waits for the page"
    return list(uffd.read_events())


@pytest.mark.timeout(60)
def test_a_dropped_mismatch_is_taken_for_the_failure_that_follows(
    protected_machine_with_irqchip: Any, open_uffd: Any
) -> None:
    """Invariant, broken by Linux: what userspace decodes is what failed.

    The fault that KVM makes again for a page that has come is a mismatch by then; its result is
    dropped, and kvm_run stays filled.  An ordinary failure in the same KVM_RUN, which is bare, then
    passes for a description of the other page.
    """
    machine = protected_machine_with_irqchip
    machine.home.view()[CODE : CODE + len(TWO_LOADS)] = TWO_LOADS
    uffd = open_uffd(0)
    with Memfd("shared", SIZE) as file, Mapping.from_memfd(file) as shared:
        uffd.register(shared.address, PAGE, Mode.MISSING)
        shared.protect(PAGE, PAGE, PROT_NONE)
        fd = machine.vm.create_guest_memfd(SIZE)
        where = TARGET, SIZE, shared.address
        machine.vm.set_user_memory_region2(1, *where, GMEM, guest_memfd=fd)
        machine.slots.add(MemorySlot(TARGET, SIZE, shared.address, 1, GMEM))
        regs = uapi.kvm_regs(rip=CODE, rflags=RFLAGS, rbx=TARGET, rdx=TARGET + PAGE)
        machine.vcpu.set_regs(regs)
        said: list[Any] = []
        thread = threading.Thread(target=lambda: said.append(machine.run()))
        thread.start()
        try:
            (event,) = awaited(uffd)
            assert isinstance(event, PageFault)
            assert event.address == shared.address
            machine.vm.set_memory_attributes(TARGET, PAGE, PRIVATE)
        finally:
            uffd.zeropage(shared.address, PAGE)
            thread.join()
        # The first load was made, and it is the second that failed.
        assert machine.vcpu.get_regs().rip == CODE + 3
        assert said == [MemoryFault(TARGET, PAGE, 0, errno.EFAULT)]
        assert machine.run() == BareFault(errno.EFAULT)
        shared.protect(PAGE, PAGE, PROT_READ)
        assert isinstance(machine.run(), Io)
        os.close(fd)
        machine.vm.close()
