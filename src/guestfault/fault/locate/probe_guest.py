"""What the numbers in a fault record mean on this host, found out by running a guest.

A record's address is a guest physical one where the processor walks the guest's tables itself (EPT,
NPT), and a linear one where KVM does (shadow paging).  Its error code has the bits of a page fault
- or, under EPT, of an exit qualification, in which a fetch is bit 2 and bit 4 means something else.
Which of these holds depends on the processor, on module parameters and on what KVM runs on, and a
table of those would be out of date in the next kernel.

So a guest that we know all about is run: its linear addresses are its physical ones plus 4 GiB, and
it reads, writes and executes one absent page, at an address of which each byte counts.  The three
records say which of the two numbers comes back and which bits tell the accesses apart.  The answer
is a property of the host, so it is found once per process and KVM.
"""

from __future__ import annotations

import errno
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from typing import Final

from guestfault.errors import KernelError, Unavailable
from guestfault.fault.access import AccessKind
from guestfault.fault.locate.run_trace import FaultRecord, RunTrace
from guestfault.kvm.protocols import System, Vcpu
from guestfault.linux.tracefs import Tracefs
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.uapi import kvm as uapi
from guestfault.uapi.mman import PROT_NONE
from guestfault.x86.registers import X86_EFLAGS_FIXED
from guestfault.x86.segments import Segments
from guestfault.x86.tables import Mapping, PagingMode, TableBuilder

__all__ = ["Meaning", "learn", "meanings"]

_GVA_OFFSET: Final = 1 << 32
_PAGES: Final = 16
_CODE: Final = 8 * PAGE_SIZE
_ABSENT: Final = 12 * PAGE_SIZE
_TARGET: Final = _ABSENT + 0x123
_LOAD, _STORE = b"\x8a\x03", b"\x88\x03"  # mov al, [rbx]; mov [rbx], al

_KINDS: Final = (AccessKind.READ, AccessKind.WRITE, AccessKind.FETCH)

_lock = threading.Lock()
_known: dict[tuple[str, str], dict[str, Meaning] | Unavailable] = {}


@dataclass(frozen=True, slots=True)
class Meaning:
    """What one event's numbers are: whether its address is a gva, and the bits that tell the kind.

    ``fetch_mask`` is 0 where a fetch cannot be told from a read, and ``write_mask`` likewise.
    """

    is_gva: bool
    write_mask: int
    fetch_mask: int

    def kind(self, code: int) -> AccessKind | None:
        """The kind of access that an error code stands for; ``None`` if it does not tell."""
        if code & self.write_mask:
            return AccessKind.WRITE
        if code & self.fetch_mask:
            return AccessKind.FETCH
        return AccessKind.READ if self.write_mask and self.fetch_mask else None


def meanings(system: System, tracefs: Tracefs) -> dict[str, Meaning]:
    """What the events that fire on this host mean, by event name; known after the first call.

    Raises :class:`~guestfault.errors.Unavailable`, each time, if no event says anything.
    """
    key = (system.name, str(tracefs.path))
    with _lock:
        if key not in _known:
            # On a thread of its own: one that has run a vCPU keeps a signal blocked for good.
            with ThreadPoolExecutor(max_workers=1) as thread:
                try:
                    _known[key] = learn(thread.submit(run_probe_guest, system, tracefs).result())
                except KernelError as error:
                    _known[key] = _unavailable(f"the probe guest fails: {error}")
                except Unavailable as error:
                    _known[key] = error
        known = _known[key]
        if isinstance(known, Unavailable):
            raise Unavailable(known.what, known.why, known.mend)
        return known


def _unavailable(why: str) -> Unavailable:
    return Unavailable("KVM's tracepoints", why, "use another locator")


def learn(probed: dict[AccessKind, list[FaultRecord]]) -> dict[str, Meaning]:
    """Work the meanings out from the records of a read, a write and a fetch of ``_TARGET``.

    An event counts if it has come with each of the three, with the same one of the two addresses.
    Raises :class:`~guestfault.errors.Unavailable` if none does.
    """
    first: dict[AccessKind, dict[str, FaultRecord]] = {
        kind: {record.event: record for record in reversed(records)}
        for kind, records in probed.items()
    }
    found = {}
    for event in set.intersection(*(set(records) for records in first.values())):
        read, write, fetch = (first[kind][event] for kind in _KINDS)
        if not read.number == write.number == fetch.number:
            continue
        if read.number not in (_TARGET, _TARGET + _GVA_OFFSET):
            continue
        found[event] = Meaning(
            is_gva=read.number != _TARGET,
            write_mask=write.code & ~(read.code | fetch.code),
            fetch_mask=fetch.code & ~(read.code | write.code),
        )
    if not found:
        raise _unavailable("none names the access of a guest that is known to make it")
    return found


def run_probe_guest(system: System, tracefs: Tracefs) -> dict[AccessKind, list[FaultRecord]]:
    """Read, write and fetch an absent page at CPL 3; the records of each."""
    tables = TableBuilder(PagingMode.FOUR_LEVEL, first_table=0)
    tables.map(Mapping(gva=_GVA_OFFSET, gpa=0, length=_PAGES * PAGE_SIZE, user=True))
    image, state = tables.image(), tables.state
    regs, sregs = uapi.kvm_regs(), uapi.kvm_sregs()
    regs.rflags, regs.rbx = X86_EFLAGS_FIXED, _GVA_OFFSET + _TARGET
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = state.cr0, state.cr3, state.cr4, state.efer
    for name, fields in asdict(Segments.long_mode(cpl=3)).items():
        setattr(sregs, name, uapi.kvm_segment(**fields))
    with ExitStack() as stack:
        ram = stack.enter_context(GuestRam(_PAGES * PAGE_SIZE, name="probe-guest"))
        vm = stack.enter_context(closing(system.create_vm()))
        vcpu = vm.create_vcpu(0)
        ram.bytes[: len(image)] = image
        ram.bytes[_CODE : _CODE + 4] = _LOAD + _STORE
        ram.guest.protect(_ABSENT, PAGE_SIZE, PROT_NONE)
        vm.set_user_memory_region(0, 0, ram.size, ram.guest.address)
        sregs.apic_base = vcpu.get_sregs().apic_base
        vcpu.set_sregs(sregs)
        trace = stack.enter_context(RunTrace(tracefs))
        entry = {
            AccessKind.READ: _GVA_OFFSET + _CODE,
            AccessKind.WRITE: _GVA_OFFSET + _CODE + len(_LOAD),
            AccessKind.FETCH: _GVA_OFFSET + _TARGET,
        }
        return {kind: _fail(vcpu, regs, rip, trace, system) for kind, rip in entry.items()}


def _fail(
    vcpu: Vcpu, regs: uapi.kvm_regs, rip: int, trace: RunTrace, system: System
) -> list[FaultRecord]:
    regs.rip = rip
    vcpu.set_regs(regs)
    while (result := vcpu.run()) == -errno.EINTR:
        pass
    if result != -errno.EFAULT:
        ended = f"in {result}, exit {vcpu.kvm_run.exit_reason}"
        raise _unavailable(f"on {system.name} the probe guest's absent page ends {ended}")
    return trace.faults()
