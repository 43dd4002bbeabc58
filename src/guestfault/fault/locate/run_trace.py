"""What KVM's tracepoints tell of the last ``KVM_RUN`` on this thread, if it failed with -EFAULT.

On its way to a bare -EFAULT a thread passes a tracepoint that has the address.  "The last record
before the exit" is nearly the answer, and nearly is not enough: KVM passes the same tracepoints for
every access that *succeeds*, for what its emulator reads, and for ``KVM_TRANSLATE``.  A record of
one of those, taken for the failed access, is an answer that is wrong and looks certain.

So the thread listens to the beginnings and ends of things too, all into one ring, and the records
are read backwards like a sentence::

    kvm_fpu load=1              KVM_RUN has begun
      kvm_entry                 the guest runs (not every KVM says so)
      kvm_page_fault            an access was not in the second-stage tables ...
      kvm_mmu_spte_requested    ... and now it is: that one succeeded
      kvm_entry
      kvm_page_fault            another one ...
    kvm_userspace_exit          ... with which KVM_RUN ended: errno -14

An answer takes all of: the newest ``kvm_userspace_exit``, with errno -EFAULT or -EHWPOISON;
directly before it, one fault record or more; before these, a record that begins something.
Whatever else happened before the run, after it or early in it cannot be mistaken for the access, so
nothing need be drained and no count kept, and asking twice gives the same answer.  If the ring has
come round over part of the sentence, there is no answer.

**The invariant** that lets several vCPUs be traced at once: an event of one thread records what
that thread does and nothing else.  A trace belongs to the thread that made it; another that asks it
gets a :class:`RuntimeError`.
"""

from __future__ import annotations

import errno
import struct
import threading
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Final, NamedTuple, Self

from guestfault.dialect.interface import EHWPOISON
from guestfault.errors import Unavailable
from guestfault.linux.perf_event import RAW_OFFSET, PerfEvent
from guestfault.linux.perf_ring import OverwriteRing
from guestfault.linux.tracefs import EventFormat, Tracefs

__all__ = ["FAULT_EVENTS", "FaultRecord", "RunTrace", "Sentence"]

FAULT_EVENTS: Final = {
    "kvm_page_fault": ("kvm", "fault_address", "error_code"),
    "kvm_mmu_pagetable_walk": ("kvmmmu", "addr", "pferr"),
}
"""The events that name an access: their group, the field of the address, that of the error code."""

_BEGINNINGS: Final = {
    "kvm_fpu": ("kvm", "load == 1"),  # passed with 0 at the end of a run
    "kvm_entry": ("kvm", None),
    "kvm_mmu_spte_requested": ("kvmmmu", None),
}
"""The events after which something new begins: their group, and which of their records count."""
_EXIT: Final = ("kvm", "kvm_userspace_exit")

_FAILURES: Final = frozenset({-errno.EFAULT, -EHWPOISON})
_COMMON_TYPE: Final = struct.Struct(f"<{RAW_OFFSET}xH")


class FaultRecord(NamedTuple):
    """An access that KVM had to look at: a ``number`` and an error code, meaning as yet unknown."""

    event: str
    number: int
    code: int


@dataclass(frozen=True)
class Sentence:
    """How to read the records: which event is which, and where its fields lie in a sample."""

    exit_id: int
    exit_errno: struct.Struct
    begins: frozenset[int]
    faults: dict[int, tuple[str, struct.Struct, struct.Struct]]

    @classmethod
    def of(cls, formats: dict[str, EventFormat]) -> Self:
        """For the events that this kernel has; ``kvm_userspace_exit`` must be one of them."""
        exit_ = formats[_EXIT[1]]
        return cls(
            exit_id=exit_.id,
            exit_errno=_field(exit_, "errno"),
            begins=frozenset(formats[name].id for name in _BEGINNINGS if name in formats),
            faults={
                formats[name].id: (
                    name,
                    _field(formats[name], address),
                    _field(formats[name], code),
                )
                for name, (_, address, code) in FAULT_EVENTS.items()
                if name in formats
            },
        )

    def read(self, ring: OverwriteRing) -> list[FaultRecord]:
        """The fault records that the last run ended with, newest first; empty if none is known."""
        faults: list[FaultRecord] = []
        newest_first = ring.newest_first()
        common_type = _COMMON_TYPE.unpack_from
        for memory, at in newest_first:
            # What came after the run says nothing about it.
            if common_type(memory, at)[0] == self.exit_id:
                if self.exit_errno.unpack_from(memory, at)[0] in _FAILURES:
                    break
                return []
        for memory, at in newest_first:
            (number,) = common_type(memory, at)
            if fault := self.faults.get(number):
                name, address, code = fault
                (gva_or_gpa,) = address.unpack_from(memory, at)
                (bits,) = code.unpack_from(memory, at)
                faults.append(FaultRecord(name, gva_or_gpa, bits))
            elif number in self.begins:
                return faults
            else:  # the end of an earlier run: where this one began is not recorded
                return []
        return []


def _field(event: EventFormat, name: str) -> struct.Struct:
    try:
        field = event.fields[name]
        return struct.Struct(f"<{RAW_OFFSET + field.offset}x{field.code.removeprefix('<')}")
    except (KeyError, ValueError):
        why = f"no number {name!r} in its format"
        raise Unavailable(f"tracepoint {event.name}", why, "report this kernel's format") from None


def _formats(tracefs: Tracefs) -> dict[str, EventFormat]:
    """Those of our events that there are.  Raises if one is needed and is not there."""
    found = {_EXIT[1]: tracefs.event(*_EXIT)}
    missing = None
    groups = {name: group for name, (group, _) in _BEGINNINGS.items()}
    groups |= {name: group for name, (group, _, _) in FAULT_EVENTS.items()}
    for name, group in groups.items():
        try:
            found[name] = tracefs.event(group, name)
        except Unavailable as error:
            missing = missing or error
    # Each stands in for the others of its kind, but one of each there must be.
    if missing and not (found.keys() & FAULT_EVENTS and found.keys() & _BEGINNINGS):
        raise missing
    return found


class RunTrace:
    """The trace of the calling thread's runs, from now on until :meth:`close`.

    ``tracefs`` is where the events are described.  ``pages``, a power of two, is the size of the
    ring.  Raises :class:`~guestfault.errors.Unavailable` without the events or the right to them.
    """

    def __init__(self, tracefs: Tracefs, *, pages: int = 1) -> None:
        formats = _formats(tracefs)
        self._thread = threading.get_ident()
        self._sentence = Sentence.of(formats)
        with ExitStack() as stack:
            first, *others = [
                stack.enter_context(PerfEvent(event, overwrite=True)) for event in formats.values()
            ]
            self._ring = first.map_overwrite(pages)
            for event in others:
                event.write_to(first)
            for event in (first, *others):
                _, records = _BEGINNINGS.get(event.event.name, ("", None))
                if records is not None:
                    event.filter(records)
                event.enable()
            self._events = stack.pop_all()

    def faults(self) -> list[FaultRecord]:
        """The fault records with which the last run failed, newest first; empty if none is known.

        The newest is the failed access.  Raises :class:`RuntimeError` on another thread than the
        one that made the trace, whose runs it would not know.
        """
        if threading.get_ident() != self._thread:
            raise RuntimeError("a RunTrace knows its own thread's runs only: make one per thread")
        return self._sentence.read(self._ring)

    def close(self) -> None:
        """Stop listening.  May be called again."""
        self._events.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
