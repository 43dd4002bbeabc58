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

Reading record by record takes longer than all else, and the sentences of one guest nearly all have
one shape.  So a :class:`Shape` that has been met is kept, and the next sentence is first held
against it: one look at every size and every event, one at the numbers.

**The invariant** that lets several vCPUs be traced at once: an event of one thread records what
that thread does and nothing else.  A trace belongs to the thread that made it; another that asks it
gets a :class:`RuntimeError`.
"""

from __future__ import annotations

import errno
import struct
from contextlib import ExitStack
from dataclasses import dataclass
from threading import get_ident
from typing import Final, NamedTuple, Self

from guestfault.closing import Closing
from guestfault.dialect.interface import EHWPOISON
from guestfault.errors import Unavailable
from guestfault.linux.perf_event import RAW_OFFSET, PerfEvent
from guestfault.linux.perf_ring import OverwriteRing
from guestfault.linux.tracefs import EventFormat, Tracefs

__all__ = ["FAULT_EVENTS", "FaultRecord", "RunTrace", "Sentence", "Shape"]

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
_SIZE: Final = struct.Struct("<6xH")
_COMMON_TYPE: Final = struct.Struct(f"<{RAW_OFFSET}xH")


class FaultRecord(NamedTuple):
    """An access that KVM had to look at: a ``number`` and an error code, meaning as yet unknown."""

    event: str
    number: int
    code: int


class Shape(NamedTuple):
    """The records of one kind of sentence, from its end: an exit, faults, a beginning."""

    frame: struct.Struct
    """The size and the event of each."""
    framed: tuple[int, ...]
    """What they are."""
    errno: struct.Struct
    fault_at: int
    """Where the newest fault begins; what follows is as in :attr:`Sentence.faults`."""
    numbers: struct.Struct
    event: str
    code_first: bool

    def read(self, ring: OverwriteRing) -> FaultRecord | None:
        """The failed access, if the newest thing in the ring is a sentence of this shape."""
        memory, at = ring.newest()
        frame = self.frame
        if at + frame.size > len(memory) or frame.unpack_from(memory, at) != self.framed:
            return None
        if self.errno.unpack_from(memory, at)[0] not in _FAILURES:
            return None
        address, code = self.numbers.unpack_from(memory, at + self.fault_at)
        if self.code_first:
            address, code = code, address
        return FaultRecord(self.event, address, code)


@dataclass(frozen=True)
class Sentence:
    """How to read the records: which event is which, and where its fields lie in a sample."""

    exit_id: int
    exit_errno: struct.Struct
    begins: frozenset[int]
    faults: dict[int, tuple[str, struct.Struct, bool]]
    """An event's name, its two numbers, and whether the code comes before the address."""

    @classmethod
    def of(cls, formats: dict[str, EventFormat]) -> Self:
        """For the events that this kernel has; ``kvm_userspace_exit`` must be one of them."""
        exit_ = formats[_EXIT[1]]
        return cls(
            exit_id=exit_.id,
            exit_errno=_field(exit_, "errno"),
            begins=frozenset(formats[name].id for name in _BEGINNINGS if name in formats),
            faults={
                formats[name].id: (name, *_two_fields(formats[name], address, code))
                for name, (_, address, code) in FAULT_EVENTS.items()
                if name in formats
            },
        )

    def shape(self, ring: OverwriteRing) -> Shape | None:
        """The shape of a sentence that has been read; ``None`` if it is not the newest thing."""
        records: list[tuple[int, int]] = []
        for memory, at in ring.newest_first():
            (event,) = _COMMON_TYPE.unpack_from(memory, at)
            if not records and event != self.exit_id:
                return None
            records.append((_SIZE.unpack_from(memory, at)[0], event))
            if event in self.begins:
                break
        name, numbers, code_first = self.faults[records[1][1]]
        return Shape(
            struct.Struct("<" + "".join(f"6xH4xH{size - RAW_OFFSET - 2}x" for size, _ in records)),
            tuple(number for record in records for number in record),
            self.exit_errno,
            records[0][0],
            numbers,
            name,
            code_first,
        )

    def read(self, ring: OverwriteRing) -> list[FaultRecord]:
        """The fault records that the last run ended with, newest first; empty if none is known."""
        newest_first = ring.newest_first()
        type_of, exit_id = _COMMON_TYPE.unpack_from, self.exit_id
        for memory, at in newest_first:
            # What came after the run says nothing about it.
            if type_of(memory, at)[0] == exit_id:
                if self.exit_errno.unpack_from(memory, at)[0] in _FAILURES:
                    break
                return []
        faults: list[FaultRecord] = []
        known = self.faults
        for memory, at in newest_first:
            (number,) = type_of(memory, at)
            if number in known:
                name, numbers, code_first = known[number]
                address, code = numbers.unpack_from(memory, at)
                if code_first:
                    address, code = code, address
                faults.append(FaultRecord(name, address, code))
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


def _two_fields(event: EventFormat, address: str, code: str) -> tuple[struct.Struct, bool]:
    """Both numbers of a fault, read at once; and whether the code comes first in it."""
    one, other = _field(event, address), _field(event, code)
    code_first = other.size < one.size
    if code_first:
        one, other = other, one
    # Each is a gap from the record's beginning and a number; the second gap shrinks by the first.
    gap = other.size - struct.calcsize(f"<{other.format[-1]}") - one.size
    return struct.Struct(f"{one.format}{gap}x{other.format[-1]}"), code_first


def _not_this_thread() -> RuntimeError:
    return RuntimeError("a RunTrace knows its own thread's runs only: make one per thread")


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


class RunTrace(Closing):
    """The trace of the calling thread's runs, from now on until :meth:`close`.

    ``tracefs`` is where the events are described.  ``pages``, a power of two, is the size of the
    ring.  Raises :class:`~guestfault.errors.Unavailable` without the events or the right to them.
    """

    def __init__(self, tracefs: Tracefs, *, pages: int = 1) -> None:
        self.formats = formats = _formats(tracefs)
        """The events that are listened to."""
        self._thread = get_ident()
        self.sentence = Sentence.of(formats)
        self._usual: Shape | None = None
        with ExitStack() as stack:
            first, *others = [
                stack.enter_context(PerfEvent(event, overwrite=True)) for event in formats.values()
            ]
            self.ring = first.map_overwrite(pages)
            for event in others:
                event.write_to(first)
            for event in (first, *others):
                _, records = _BEGINNINGS.get(event.event.name, ("", None))
                if records is not None:
                    event.filter(records)
                event.enable()
            self._events = stack.pop_all()

    def failed(self) -> FaultRecord | None:
        """The access with which the last run failed, if it is known: the newest of :meth:`faults`.

        Raises as that does.
        """
        if get_ident() != self._thread:
            raise _not_this_thread()
        usual = self._usual
        if usual is not None and (found := usual.read(self.ring)):
            return found
        faults = self.faults()
        if not faults:
            return None
        shape = self.sentence.shape(self.ring)
        if shape is not None:
            self._usual = shape
        return faults[0]

    def faults(self) -> list[FaultRecord]:
        """The fault records with which the last run failed, newest first; empty if none is known.

        Raises :class:`RuntimeError` on another thread than the one that made the trace, whose runs
        it would not know.
        """
        if get_ident() != self._thread:
            raise _not_this_thread()
        return self.sentence.read(self.ring)

    def close(self) -> None:
        """Stop listening.  May be called again."""
        self._events.close()
