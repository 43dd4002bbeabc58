"""Fault-around: with a page that was asked for, bring in those that will be asked for next.

A fault costs an exit, or a thread's sleep, many times what it costs to copy a page.  A guest that
goes through its memory in order can be spared most of them; one that jumps about can not, and must
not pay for the attempt.  What it will do is guessed from what it did last, as Linux guesses for a
file that is read (mm/readahead.c):

- A *stream* is a place up to which pages have come in.  A fault that is the stream's very next
  page, on either side, goes on with it, and its window doubles, up to a limit.  A fault that is
  near, not further off than a window is wide, goes on with it too, and its window halves.
- A fault that is no stream's begins one of its own, with a window of one page: nothing comes in
  but what was asked for.  So a guest that jumps about gets nothing ahead.
- A few streams are kept, and the one that was least lately gone on with is given up first: a guest
  that adds one array to another goes through three.  A new one takes rank behind half of the
  others, so that faults here and there push out each other and not those that go on.

A window is *aligned*: one of 16 pages begins at a multiple of 16.  It is what lies in the same
block of a packed or remote source, which is read as a whole anyhow, and it reaches to both sides
of the page, so that it makes no difference which way the guest goes.  It ends where the memory slot
ends, and at the first page that is in already or somebody else's.

Whether the guess was right is found out from pages that are withheld
(:mod:`~guestfault.paging.ahead`).
"""

from __future__ import annotations

from collections.abc import Sequence

from guestfault.memory.ram import PAGE_SIZE
from guestfault.memory.slots import SlotMap
from guestfault.paging.pager import Pager

__all__ = ["DEFAULT_WINDOW", "OFF", "STREAMS", "FaultAround", "Stream", "slot_pages"]

OFF = 1
"""The limit of windows of which each is the one page that was asked for."""

DEFAULT_WINDOW = 16
"""Pages; measured by ``benchmarks/fewer_faults.py``, see ``docs/run.md``."""

STREAMS = 6
"""How many are kept for one vCPU."""
RANK = 3
"""How many of them no new one comes before."""


class Stream:
    """Its last window: the pages that came in with it, and how wide it was allowed to be.

    A fault on a page from ``low`` to ``high`` (not included) goes on with it.
    """

    __slots__ = ("end", "first", "high", "low", "size")

    def __init__(self) -> None:
        self.first = self.end = self.low = self.high = 0
        self.size = 1

    def is_at(self, first: int, end: int, size: int) -> None:
        """These pages have come in."""
        self.first, self.end, self.size = first, end, size
        self.low, self.high = first - size, end + size


class FaultAround:
    """Brings in what one vCPU asks for, and around it.  Belongs to the thread that asks.

    ``limit`` is how many pages a window may have, a power of two; ``parts`` are the ranges of pages
    of which no window is to cross the borders.
    """

    def __init__(self, pager: Pager, limit: int, parts: Sequence[range]) -> None:
        if limit < OFF or limit & (limit - 1):
            raise ValueError(f"a window of {limit} pages, which is not a power of two")
        self._pager = pager
        self._limit = limit
        self._parts = parts
        self._streams = [Stream() for _ in range(STREAMS)]  # the last gone on with first

    def bring_in(self, offset: int) -> bool:
        """:meth:`~guestfault.paging.pager.Pager.bring_in`, and what is around it."""
        if self._limit == OFF:
            return self._pager.bring_in(offset)
        page = offset // PAGE_SIZE
        streams = self._streams
        for stream in streams:
            if stream.low <= page < stream.high:
                break
        else:
            stream = streams.pop()
            stream.is_at(page, page + 1, 1)
            streams.insert(RANK, stream)
            return self._pager.bring_in(offset)
        if stream is not streams[0]:
            streams.remove(stream)
            streams.insert(0, stream)
        return self._go_on(stream, offset, page)

    def _go_on(self, stream: Stream, offset: int, page: int) -> bool:
        if stream.first <= page < stream.end:
            # Withheld; or the host has dropped it.  It says nothing of where the guest is now.
            return self._pager.bring_in(offset)
        exact = page in (stream.end, stream.first - 1)
        size = min(2 * stream.size, self._limit) if exact else max(stream.size // 2, 1)
        run = self._pager.bring_in_around(offset, self._window(page, size))
        if len(run) < 2:  # others are here too, or the source had it alone
            size = max(size // 2, 1)
        stream.is_at(min(page, run.start), max(page + 1, run.stop), size)
        return bool(run)

    def _window(self, page: int, size: int) -> range:
        first = page & -size
        for part in self._parts:
            if page in part:
                return range(max(first, part.start), min(first + size, part.stop))
        return range(page, page + 1)


def slot_pages(slots: SlotMap, start: int) -> list[range]:
    """The pages of the RAM at host address ``start`` that each slot shows."""
    return [
        range((slot.hva - start) // PAGE_SIZE, (slot.hva + slot.size - start) // PAGE_SIZE)
        for slot in slots
    ]
