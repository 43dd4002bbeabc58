"""What a vCPU's own thread does about a failed access: resolve it, account for it, run on.

This is the user half of the design: no other thread, no queue, no wake-up.  The access comes back
to the thread that made it as a result of KVM_RUN, the page is brought in on that thread, and
KVM_RUN makes the access again.
"""

from __future__ import annotations

import time

from guestfault.errors import GuestfaultError
from guestfault.fault.access import Access, FoundBy
from guestfault.fault.cause.evidence import Failure
from guestfault.fault.cause.why import why
from guestfault.fault.locate.annotation import from_annotation
from guestfault.fault.locate.mmio import from_mmio
from guestfault.fault.outcome import BareFault, MemoryFault, RamMmio
from guestfault.kvm.protocols import Vcpu
from guestfault.linux import process_memory
from guestfault.memory.ram import PAGE_SIZE
from guestfault.memory.slots import SlotMap
from guestfault.paging.account import FaultAccount
from guestfault.paging.around import OFF, FaultAround, slot_pages
from guestfault.paging.guard import FaultLoopError, RepeatGuard
from guestfault.paging.pager import Pager

__all__ = ["FaultResolver", "UnresolvableError"]


class UnresolvableError(GuestfaultError):
    """An access failed that no page can cure: it is in no slot, or in memory that has failed."""

    def __init__(self, access: Access, reason: str) -> None:
        self.access = access
        super().__init__(f"{access}: {reason}")


class FaultResolver:
    """Resolves the failed accesses of one vCPU.  Belongs to the thread that runs it.

    With a page it brings in up to ``fault_around`` pages (:mod:`guestfault.paging.around`).
    """

    def __init__(
        self, vcpu: Vcpu, pager: Pager, slots: SlotMap, *, fault_around: int = OFF
    ) -> None:
        self._vcpu = vcpu
        self.pager = pager
        self.fault_around = fault_around
        self._slots = slots
        self._around = FaultAround(pager, fault_around, slot_pages(slots, pager.ram.guest.address))
        self.account = FaultAccount()
        self.guard = RepeatGuard(vcpu.vcpu_id, vcpu.get_regs)

    def resolve_annotated(self, fault: MemoryFault) -> None:
        """Bring in what the kernel says is missing.

        Raises :class:`~guestfault.paging.source.base.SourceError`,
        :class:`~guestfault.paging.guard.FaultLoopError` or :class:`UnresolvableError`; the vCPU
        must not run on then.
        """
        self.account.annotated += 1
        self._bring_in(from_annotation(fault, self._slots), fault)

    def resolve_bare(self, fault: BareFault, candidates: tuple[Access, ...]) -> None:
        """Bring in what the locators found (:class:`guestfault.fault.locate.chain.Locators`).

        Where several accesses are in question all of them are brought in: it makes no difference to
        the guest which of its own pages are there, only to the count.  Raises as
        :meth:`resolve_annotated` does.
        """
        account, best = self.account, candidates[0]
        account.bare += 1
        account.by_tracepoint += best.found_by is FoundBy.TRACEPOINT
        account.by_decode += best.found_by is FoundBy.DECODE
        account.unsure += not best.certain
        self._bring_in(best, fault)
        for other in candidates[1:]:
            if other.hva is not None:
                offset = other.hva - self.pager.ram.guest.address
                self.pager.bring_in_range(offset, other.size)

    def resolve_fetch(self, access: Access) -> None:
        """Bring in code that KVM's emulator could not fetch (KVM_EXIT_INTERNAL_ERROR).

        Raises as :meth:`resolve_annotated` does.
        """
        self.account.fetches += 1
        self._bring_in(access, None)

    def resolve_silent(self, access: Access) -> None:
        """Bring in what a vCPU that stands still is waiting for, though nothing has failed.

        Raises as :meth:`resolve_annotated` does.
        """
        self.account.silent += 1
        self._bring_in(access, None)

    def resolve_ram_mmio(self, exit_: RamMmio) -> None:
        """Bring the page in and do what KVM's emulator could not: answer the read, or write.

        A read answered with anything but the page's bytes is silent corruption, and a write that is
        dropped is another: the instruction is past and will not be made again.  Raises as
        :meth:`resolve_annotated` does, and nothing has been answered then.
        """
        access = from_mmio(exit_, self._slots)
        offset = self._bring_in(access, exit_)
        # By the kernel's hand: an instruction of ours that meets memory which has failed since the
        # page came in would be the end of the process.
        at = self.pager.ram.host.address + offset
        if exit_.is_write:
            done = process_memory.write(at, exit_.data)
        else:
            memory = process_memory.read(at, exit_.length)
            done = memory is not None
            if memory is not None:
                self._vcpu.kvm_run.mmio.data[: exit_.length] = memory
        if not done:
            raise UnresolvableError(access, str(why(access, exit_)))
        self.account.ram_mmio += 1

    def _bring_in(self, access: Access, failure: Failure | None) -> int:
        """Bring the access's pages in; the RAM offset at which it begins."""
        began = time.perf_counter_ns()
        if access.hva is None:
            raise UnresolvableError(
                access, "it is in no memory slot, so there is no page to bring in"
            )
        try:
            self.guard.saw(access)
        except FaultLoopError as e:
            cause = str(why(access, failure))
            raise FaultLoopError(e.vcpu_id, access, e.rip, e.count, cause) from None
        offset = access.hva - self.pager.ram.guest.address
        first, last = offset // PAGE_SIZE, (offset + access.size - 1) // PAGE_SIZE
        absent = 0
        for page in range(first, last + 1):
            absent += self._around.bring_in(page * PAGE_SIZE)
        if not absent:
            self.account.again += 1
        self.account.latency.record(time.perf_counter_ns() - began)
        return offset
