"""The verdicts on a trail: of all that was touched, what the host could not serve.

Pages are judged, not accesses: the first step to a page stands for all of them.  Each page is asked
about once for reading and once for writing, and the host in one call for all that are new.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from guestfault.fault.locate.host_view import GuestMemory
from guestfault.fault.locate.residency import PageAccess, Residency, Verdict
from guestfault.fault.locate.trail import Step
from guestfault.memory.slots import MemorySlot, SlotMap

__all__ = ["Judge", "Judged"]

_ABSENT, _UNSURE = Verdict.ABSENT, Verdict.UNSURE


class Judged(NamedTuple):
    """Steps in order: to pages that are absent, that may be, and to addresses not known."""

    absent: list[Step]
    unsure: list[Step]
    unknown: list[Step]


class Judge:
    """Judges the trails of one failure, which ``KVM_RUN`` reported with ``errno``, positive."""

    def __init__(
        self, slots: SlotMap, memory: GuestMemory, residency: Residency, errno: int
    ) -> None:
        self._slots = slots
        self._memory = memory
        self._residency = residency
        self._errno = errno
        self._verdicts: dict[int, Verdict | None] = {}

    def __call__(self, steps: Iterable[Step]) -> Judged:
        """Judge the steps of one trail."""
        verdicts = self._verdicts
        # The page with the lowest bit of the kind, which is set if the access writes.
        keys = [-1 if (gpa := step[0]) is None else gpa >> 12 << 1 | step[2] & 1 for step in steps]
        if new := {key for key in keys if key >= 0 and key not in verdicts}:
            self._ask(new)
        absent: dict[int, Step] = {}
        unsure: dict[int, Step] = {}
        unknown = []
        for key, step in zip(keys, steps, strict=True):
            if key < 0:
                unknown.append(step)
                continue
            verdict = verdicts[key]
            if verdict is _ABSENT:
                absent.setdefault(key >> 1, step)
            elif verdict is _UNSURE:
                unsure.setdefault(key >> 1, step)
        return Judged(list(absent.values()), list(unsure.values()), unknown)

    def _ask(self, keys: Iterable[int]) -> None:
        verdicts = self._verdicts
        is_in = self._memory.is_in
        asked: list[int] = []
        wanted: list[PageAccess] = []
        slot: MemorySlot | None = None
        start = end = shift = 0
        for key in sorted(keys):
            gpa = key >> 1 << 12
            if not start <= gpa < end:
                if asked:
                    self._look(slot, asked, wanted)
                    asked, wanted = [], []
                slot = self._slots.find(gpa)
                if slot is None:
                    verdicts[key] = None  # a device's: an MMIO exit, and no failure
                    continue
                start, shift = slot.gpa, slot.hva - slot.gpa
                end = start + slot.size
            if is_in(gpa):
                asked.append(key)
                wanted.append((gpa + shift, key & 1 == 1))
            else:
                verdicts[key] = _ABSENT
        if asked:
            self._look(slot, asked, wanted)

    def _look(self, slot: MemorySlot | None, keys: list[int], wanted: list[PageAccess]) -> None:
        assert slot is not None
        found = self._residency.verdicts(slot, wanted, self._errno)
        self._verdicts.update(zip(keys, found, strict=True))
