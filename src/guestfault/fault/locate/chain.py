"""All locators of one vCPU, tried in order of how well they know.

==============  =======================================  ==========================================
locator         how it knows                             what it cannot know
==============  =======================================  ==========================================
annotation      the kernel filled kvm_run.memory_fault   read, write or fetch; the exact byte
tracepoint      KVM's own event on the vCPU's thread     on some hosts the gpa, or the gva
decode          the instruction at RIP, and the host     which of several absent pages
mmio            KVM_EXIT_MMIO on RAM, exact to the byte  nothing
signal          SIGBUS with the broken page's hva        read, write or fetch; the exact byte
==============  =======================================  ==========================================

The first that answers is believed.  Of a broken page the instruction is decoded as well, to say
what it wanted of the page.  An outcome that is not a failed access of the guest's has no
locator, and its answer is empty.
"""

from __future__ import annotations

from collections.abc import Callable

from guestfault.dialect.interface import EHWPOISON
from guestfault.fault.access import Access, FoundBy
from guestfault.fault.locate.annotation import from_annotation
from guestfault.fault.locate.decode import DecodeLocator
from guestfault.fault.locate.mmio import from_mmio
from guestfault.fault.locate.poison import from_poison
from guestfault.fault.outcome import BareFault, MemoryFault, Outcome, Poisoned, RamMmio
from guestfault.kvm.protocols import Vcpu
from guestfault.memory.ram import PAGE_SIZE
from guestfault.memory.slots import SlotMap

__all__ = ["Locators"]


class Locators:
    """The locators of one vCPU.  :meth:`locate` belongs to the thread that runs it.

    ``tracepoint`` gives the access that the kernel's tracepoints recorded since it was last asked,
    or ``None``; it is asked after each bare failure.
    """

    def __init__(
        self,
        vcpu: Vcpu,
        slots: SlotMap,
        decode: DecodeLocator,
        tracepoint: Callable[[], Access | None] | None = None,
    ) -> None:
        self._vcpu = vcpu
        self._slots = slots
        self._decode = decode
        self.tracepoint = tracepoint
        """Can be set later, by the vCPU's thread: arming it pays only for many faults."""

    def locate(self, outcome: Outcome) -> tuple[Access, ...]:
        """The access behind the outcome of the last run, best candidate first.

        Empty if the outcome is not of an access to memory that could not be had.  Ask before the
        vCPU runs again.
        """
        match outcome:
            case MemoryFault():
                return (from_annotation(outcome, self._slots),)
            case BareFault(errno):
                recorded = self.tracepoint() if self.tracepoint is not None else None
                if recorded is not None and recorded.gpa is not None:
                    return (recorded,)
                return self._decode.locate(self._vcpu.get_regs(), self._vcpu.get_sregs(), errno)
            case RamMmio():
                return (from_mmio(outcome, self._slots),)
            case Poisoned():
                return (self._broken(outcome),)
        return ()

    def _broken(self, poisoned: Poisoned) -> Access:
        """KVM's word for the page; the rest as the instruction has it, if it goes to that page."""
        page = from_poison(poisoned, self._slots)
        if page.gpa is None or not poisoned.action_required:
            return page
        regs, sregs = self._vcpu.get_regs(), self._vcpu.get_sregs()
        for access in self._decode.locate(regs, sregs, EHWPOISON):
            if access.gpa is not None and access.gpa // PAGE_SIZE == page.gpa // PAGE_SIZE:
                return access._replace(found_by=FoundBy.SIGNAL, certain=True, why="")
        return page

    def standing_at(self) -> Access | None:
        """What a vCPU that makes no progress, and has not failed either, cannot have; or ``None``.

        Only a certainty counts: a guest may stand on one instruction for as long as it likes.
        """
        best = self._decode.locate(self._vcpu.get_regs(), self._vcpu.get_sregs())[0]
        return best if best.certain else None
