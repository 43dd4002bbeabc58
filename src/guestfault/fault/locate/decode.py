"""Which access failed, reasoned out from the instruction at RIP: for a KVM that does not say.

After a bare -EFAULT the vCPU stands before an instruction, and everything that the instruction
touches can be worked out from its bytes, its registers and the guest's page tables
(:class:`~guestfault.fault.locate.trail.Trail`): its own fetch, its operands, its stack, descriptors
and gates, both sides of a page boundary, and each page-table entry on the way.  One of those the
host could not serve.  The host is asked about each
(:class:`~guestfault.fault.locate.residency.Residency`), and what remains is the answer:

- one absent page, which the instruction must touch: that one, certainly;
- one absent page, which it may touch or not: that one, if nothing else is in question;
- several: all of them, ranked in the order in which the processor meets them, none certain;
- none: everything it touches, ranked, none certain.  Another thread may have brought the page in
  since, or the access was KVM's own.

Nothing comes after an access whose content is not there yet: without its bytes there is no
instruction, without the table no address.  That access is the failed one, and ends the list.

An event (an interrupt, an exception) is delivered with RIP on an instruction that has nothing to do
with it, and reads a gate, the task state and a stack
(:func:`~guestfault.x86.events.possible_deliveries`).  Where one of those is absent too, nothing is
certain; where only they are, they are the answer, ranked.  The same goes for the page of code that
follows, into which a processor in software may look ahead.
"""

from __future__ import annotations

import errno as _errno
from collections.abc import Iterable

from iced_x86 import Instruction, Register

from guestfault.fault.access import Access, FoundBy
from guestfault.fault.locate.host_view import GuestMemory
from guestfault.fault.locate.judge import Judge, Judged
from guestfault.fault.locate.residency import Residency
from guestfault.fault.locate.trail import Step, Trail
from guestfault.memory.ram import PAGE_SIZE
from guestfault.memory.slots import SlotMap
from guestfault.uapi import kvm as uapi
from guestfault.x86 import transfer
from guestfault.x86.accesses import data_accesses
from guestfault.x86.addressing import CodeContext
from guestfault.x86.events import possible_deliveries
from guestfault.x86.instruction import MAX_LENGTH, decode, instruction_text
from guestfault.x86.registers import ERROR_CODE_VECTORS
from guestfault.x86.state import CpuState

__all__ = ["DecodeLocator"]

_CS = Register.CS
_NONE = Judged([], [], [])


class DecodeLocator:
    """Names the failed access of a stopped vCPU of one VM.

    ``memory`` reads guest memory through the host view, ``residency`` answers for the host.
    Any thread may call it, one at a time for each vCPU.
    """

    def __init__(self, slots: SlotMap, memory: GuestMemory, residency: Residency) -> None:
        self._slots = slots
        self._memory = memory
        self._residency = residency

    def locate(
        self, regs: uapi.kvm_regs, sregs: uapi.kvm_sregs, errno: int = _errno.EFAULT
    ) -> tuple[Access, ...]:
        """The candidates, best first; alone and ``certain`` if there is but one.

        ``regs`` and ``sregs`` are the vCPU's after the ``KVM_RUN`` that failed with ``errno``
        (EFAULT or EHWPOISON, positive).  Never empty, and never raises for anything they may hold.
        """
        state = CpuState.from_kvm(regs, sregs)
        return _Search(self, state, errno).answer()


class _Search:
    """One question: the trail of the instruction, the verdicts on it, and the choice."""

    def __init__(self, locator: DecodeLocator, state: CpuState, errno: int) -> None:
        self._slots = locator._slots
        self._judge = Judge(locator._slots, locator._memory, locator._residency, errno)
        self._trail = Trail(state, locator._memory)
        self._context = CodeContext(state, state.code_size, self._trail.read)
        self._text: str | None = None

    def answer(self) -> tuple[Access, ...]:
        instruction = self._fetch()
        if instruction is not None:
            self._text = instruction_text(instruction)
            for access in data_accesses(instruction, self._context):
                self._trail.add(access)
        vector = self._trail.exception
        if vector is not None:
            has_code = self._context.state.protected and vector in ERROR_CODE_VECTORS
            delivery = transfer.interrupt(self._context, vector, error_code=has_code)
            self._trail.go_on(delivery)
        return self._choose(self._trail.steps)

    def _fetch(self) -> Instruction | None:
        """Put the fetch on the trail; the instruction, if its bytes are all there."""
        trail, context = self._trail, self._context
        code_size = context.code_size
        rip = context.state.rip & ((1 << code_size) - 1)
        linear = context.linear(_CS, rip)
        first = PAGE_SIZE - linear % PAGE_SIZE
        code = trail.fetch(linear, min(first, MAX_LENGTH))
        if code is None:
            return None
        instruction, whole = decode(code, rip, code_size)
        here = min(instruction.len, first) if whole else first
        trail.steps[-1] = trail.steps[-1]._replace(size=max(here, 1))
        if not whole and first < MAX_LENGTH:
            beyond = (linear + first) % (1 << context.address_bits)
            rest = trail.fetch(beyond, MAX_LENGTH - first)
            if rest is None:
                return None
            instruction, whole = decode(code + rest, rip, code_size)
            trail.steps[-1] = trail.steps[-1]._replace(size=max(instruction.len - first, 1))
        return None if instruction.is_invalid else instruction

    # -- the choice ------------------------------------------------------------------------------

    def _choose(self, steps: list[Step]) -> tuple[Access, ...]:
        own = self._judge(steps)
        events = self._events()
        suspects = own.absent or own.unsure
        best = suspects[0] if suspects else None
        doubt = "" if best is None else _doubt(best, steps, own, events)
        if best is not None and not doubt:
            return (self._access(best, self._certainty(best, own), certain=True),)
        ahead = self._ahead() if best is None else ()
        ranked = [
            *((step, doubt) for step in (*own.absent, *own.unsure)),
            *((step, "delivery of an event") for step in events.absent),
            *((step, "what follows the instruction") for step in ahead),
            *((step, "its address is not known") for step in own.unknown),
            *((step, "delivery of an event") for step in events.unsure),
        ]
        if not ranked:
            why = "the host can serve everything it touches by now"
            ranked = [(step, why) for step in self._served(steps)]
        return tuple(self._access(step, why) for step, why in ranked)

    def _certainty(self, best: Step, own: Judged) -> str:
        if self._trail.ended and best is self._trail.steps[-1]:
            return "nothing goes on before its content is there"
        if own.absent and best.certain:
            return "the only page of it that the host cannot serve"
        return "the host can serve everything else"

    def _events(self) -> Judged:
        deliveries = possible_deliveries(self._context)
        if not deliveries:
            return _NONE
        trail = self._trail.fork()
        for access in deliveries:
            trail.add(access)
        return self._judge(trail.steps)

    def _ahead(self) -> list[Step]:
        """The next page of code, where nothing of the instruction's own explains the failure.

        A processor in software translates a block of instructions before it executes the first, and
        stops with RIP there when it cannot fetch the last.
        """
        context = self._context
        rip = context.state.rip & ((1 << context.code_size) - 1)
        linear = context.linear(_CS, rip)
        beyond = (linear // PAGE_SIZE + 1) * PAGE_SIZE % (1 << context.address_bits)
        trail = self._trail.fork()
        trail.fetch(beyond, 1)
        return self._judge(trail.steps).absent

    def _served(self, steps: list[Step]) -> list[Step]:
        """Every page touched, first the instruction's own, then its tables."""
        in_slots = [s for s in steps if s.gpa is not None and self._slots.find(s.gpa)] or steps[:1]
        return sorted(in_slots, key=lambda step: step.role is None)

    def _access(self, step: Step, why: str, *, certain: bool = False) -> Access:
        gpa = step.gpa
        slot = None if gpa is None else self._slots.find(gpa)
        hva = None if slot is None or gpa is None else slot.hva_of(gpa)
        what: str | None = step.role
        if what is None:
            what = f"level-{step.level} page-table entry for gva {step.via:#x}"
        return Access(
            gpa,
            step.size,
            FoundBy.DECODE,
            step.gva,
            hva,
            slot,
            step.kind,
            self._text,
            certain,
            f"{what}: {why}",
        )


def _doubt(best: Step, steps: list[Step], own: Judged, events: Judged) -> str:
    """What keeps the best candidate from being certain; empty if nothing does."""
    suspects = own.absent or own.unsure  # one for each page
    if len(suspects) > 1:
        return f"one of {len(suspects)} pages that the host cannot serve"
    if events.absent and _pages(events.absent) - _pages(suspects):
        return "an event may have been on its way, and what delivers it is absent too"
    others = own.unknown + (own.unsure if own.absent else [])
    if others and any(steps.index(step) < steps.index(best) for step in others):
        return "something before it may have failed"
    # Not sure to be made, or to have failed: it is the one only if nothing else can be.
    if own.absent and best.certain:
        return ""
    if others or _pages(events.unsure) - _pages(suspects):
        return "it need not have been made" if own.absent else "the host may have served it"
    return ""


def _pages(steps: Iterable[Step]) -> set[int]:
    return {step.gpa >> 12 for step in steps if step.gpa is not None}
