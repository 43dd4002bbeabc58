"""A guest at CPL 3 that accesses what it is told to, on the real KVM."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict

import pytest

from guestfault.errors import Unavailable
from guestfault.fault.locate.run_trace import RunTrace
from guestfault.kvm import KvmSystem, KvmVcpu
from guestfault.linux.tracefs import Tracefs
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.slots import MemorySlot, SlotMap
from guestfault.uapi import kvm as uapi
from guestfault.x86.segments import Segments
from guestfault.x86.tables import Mapping, PagingMode, TableBuilder

GVA_OFFSET = 3 << 30
PAGES = 600
CODE = 10 * PAGE_SIZE
TSS = 11 * PAGE_SIZE
_PORTS = bytes(102) + (104).to_bytes(2, "little") + bytes(8) + b"\xff"  # 0 to 63 are allowed


class Guest:
    """``PAGES`` pages of RAM, their gva the gpa plus ``GVA_OFFSET``, and one vCPU."""

    def __init__(self, system: KvmSystem, gpa: int = 0) -> None:
        self.gpa = gpa
        self.ram = GuestRam(PAGES * PAGE_SIZE)
        self.vm = system.create_vm()
        tables = TableBuilder(PagingMode.FOUR_LEVEL, first_table=gpa)
        tables.map(Mapping(gva=GVA_OFFSET, gpa=gpa, length=self.ram.size, user=True))
        # Every page has content, so that userfaultfd has something to let in.
        self.ram.bytes[:] = bytes(self.ram.size)
        image = tables.image()
        self.ram.bytes[: len(image)] = image
        self.ram.bytes[TSS : TSS + len(_PORTS)] = _PORTS
        slot = MemorySlot(gpa, self.ram.size, self.ram.guest.address, 0)
        self.slots = SlotMap()
        self.slots.add(slot)
        self.vm.set_user_memory_region(0, gpa, slot.size, slot.hva)
        self.vcpu: KvmVcpu = self.vm.create_vcpu(0)
        sregs, state = self.vcpu.get_sregs(), tables.state
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = state.cr0, state.cr3, state.cr4, state.efer
        for name, fields in asdict(Segments.long_mode(cpl=3)).items():
            setattr(sregs, name, uapi.kvm_segment(**fields))
        sregs.tr.base, sregs.tr.limit = self.gva(TSS), len(_PORTS) - 1
        self.vcpu.set_sregs(sregs)

    def gva(self, offset: int) -> int:
        """The linear address of an offset into the RAM."""
        return GVA_OFFSET + offset

    def stand_at(self, code: bytes | int, rbx: int = 0) -> None:
        """Put the vCPU before ``code``, or at an offset where it is; RBX is an offset too."""
        at = CODE
        if isinstance(code, int):
            at = code
        else:
            self.ram.bytes[CODE : CODE + len(code)] = code
        self.vcpu.set_regs(uapi.kvm_regs(rip=self.gva(at), rbx=self.gva(rbx), rflags=0x3002))

    def goes_on(self) -> bool:
        """Run it, to the port write that follows the access."""
        reached = self.vcpu.run() == 0 and self.vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_IO
        # KVM completes the write as it enters again, and must not do so over new registers.
        self.vcpu.kvm_run.immediate_exit = 1
        self.vcpu.run()
        self.vcpu.kvm_run.immediate_exit = 0
        return reached

    def protect(self, page: int, prot: int) -> None:
        self.ram.guest.protect(page * PAGE_SIZE, PAGE_SIZE, prot)

    def close(self) -> None:
        self.vm.close()
        self.ram.close()


@pytest.fixture
def system() -> Iterator[KvmSystem]:
    try:
        system = KvmSystem()
    except Unavailable as error:
        pytest.skip(str(error))
    with closing(system):
        yield system


@pytest.fixture
def traced(tracefs: Tracefs) -> Tracefs:
    """Tracefs, where this process may listen to KVM's events."""
    try:
        RunTrace(tracefs).close()
    except Unavailable as error:
        pytest.skip(str(error))
    return tracefs


@pytest.fixture
def make_guest(system: KvmSystem) -> Iterator[Callable[..., Guest]]:
    guests: list[Guest] = []

    def make(gpa: int = 0) -> Guest:
        guests.append(Guest(system, gpa))
        return guests[-1]

    yield make
    for guest in guests:
        guest.close()
