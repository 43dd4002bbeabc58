"""The pager: every page comes in once, whole, whoever asks first.

A page is absent, being filled, or filled.  The thread that finds it absent fills it from the source
through the host view, and only then lets it into the guest view; whoever else needs it meanwhile
waits for that thread.  So a page is read from the source once, is never seen half filled, and is
never written again after a guest may have written to it.

It fails closed.  If the source fails, the page goes back to absent, everyone who waited gets the
:class:`~guestfault.paging.source.base.SourceError`, and the guest view stays shut on it.
"""

from __future__ import annotations

import threading

from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.view import GuestView
from guestfault.paging.source.base import PageSource, SourceError

__all__ = ["Pager"]

_ABSENT, _FILLING, _FILLED = 0, 1, 2


class Pager:
    """Brings pages of ``ram`` in from ``source`` through ``view``.

    Offsets are bytes from the start of the RAM, which is also where the source's bytes belong.
    Any thread may ask.  Raises :class:`~guestfault.paging.source.base.SourceError` at once for a
    source of another size than the RAM.
    """

    def __init__(self, ram: GuestRam, view: GuestView, source: PageSource) -> None:
        if source.size != ram.size:
            raise SourceError(0, ram.size, f"it has {source.size} bytes, the guest {ram.size}")
        self.ram = ram
        self.view = view
        self._source = source
        self._state = bytearray(ram.pages)
        self._changed = threading.Condition()
        self._waiting = 0
        self.pages_in = 0

    def bring_in(self, offset: int) -> bool:
        """Make the page that holds ``offset`` accessible; whether it had to be filled.

        Raises :class:`~guestfault.paging.source.base.SourceError` if it cannot be had, with the
        page absent as before, and :class:`~guestfault.errors.KernelError` if it cannot be let in.
        """
        page = offset // PAGE_SIZE
        start = page * PAGE_SIZE
        mine = self._claim(page)
        if mine:
            try:
                self._source.read_into(start, self.ram.bytes[start : start + PAGE_SIZE])
            except BaseException:
                self._settle(page, _ABSENT)
                raise
        try:
            # Also for a page that was in: the host may have reclaimed it, and whoever sleeps in it
            # must be woken.
            self.view.bring_in(start, PAGE_SIZE)
        finally:
            if mine:
                self._settle(page, _FILLED)
        return mine

    def bring_in_range(self, offset: int, size: int) -> int:
        """:meth:`bring_in` for every page of a range; how many had to be filled."""
        first = offset // PAGE_SIZE
        last = (offset + size - 1) // PAGE_SIZE
        return sum(self.bring_in(page * PAGE_SIZE) for page in range(first, last + 1))

    def is_in(self, offset: int) -> bool:
        """Whether the page has been brought in."""
        return self._state[offset // PAGE_SIZE] == _FILLED

    def _claim(self, page: int) -> bool:
        """``True``: the page is ours to fill.  ``False``: it is filled."""
        with self._changed:
            while True:
                state = self._state[page]
                if state == _FILLED:
                    return False
                if state == _ABSENT:
                    self._state[page] = _FILLING
                    return True
                self._waiting += 1
                self._changed.wait()
                self._waiting -= 1

    def _settle(self, page: int, state: int) -> None:
        with self._changed:
            self._state[page] = state
            self.pages_in += state == _FILLED
            if self._waiting:
                self._changed.notify_all()
