"""The pager: every page comes in once, whole, whoever asks first.

A page is absent, being filled, or filled.  The thread that finds it absent fills it from the source
through the host view, and only then lets it into the guest view; whoever else needs it meanwhile
waits for that thread.  So a page is read from the source once, is never seen half filled, and is
never written again after a guest may have written to it.

Among Python's threads a lock decides who is first.  A compiled loop
(:mod:`~guestfault.paging.hot`) holds no lock of Python's, so once there is one, a thread that has
won a page here must win it from the loops as well: :meth:`Pager.share`.

It fails closed.  If the source fails, the page goes back to absent, everyone who waited gets the
:class:`~guestfault.paging.source.base.SourceError`, and the guest view stays shut on it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Protocol

from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.view import GuestView
from guestfault.paging.source.base import PageSource, SourceError, let_go

__all__ = ["Claims", "Pager"]

_PAUSE = 20e-6


class Claims(Protocol):
    """What Python and the compiled loops agree by (:mod:`guestfault.paging.claims`)."""

    def take(self, page: int) -> bool:
        """Whether the page is the caller's to fill, from now on."""

    def give_up(self, page: int) -> None:
        """It is nobody's again; nothing of it was written."""


class _Fill:
    """A page being filled by one thread, and what the others who need it wait for."""

    __slots__ = ("claims", "error", "over")

    def __init__(self, claims: Claims | None) -> None:
        self.claims = claims  # that have still to be asked
        self.over = False
        self.error: Exception | None = None


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
        self.source = source
        self._filled = bytearray(ram.pages)
        self._fills: dict[int, _Fill] = {}
        self._changed = threading.Condition()
        self._waiting = 0
        self._claims: Claims | None = None
        self.pages_in = 0

    def bring_in(self, offset: int) -> bool:
        """Make the page that holds ``offset`` accessible; whether it had to be filled.

        Raises :class:`~guestfault.paging.source.base.SourceError` if it cannot be had, with the
        page absent as before, and :class:`~guestfault.errors.KernelError` if it cannot be let in.
        """
        page = offset // PAGE_SIZE
        start = page * PAGE_SIZE
        fill = self._claim(page)
        if fill is None:
            # The host may have dropped the page, and whoever sleeps in it must be woken.
            self.view.bring_in(start, PAGE_SIZE)
            return False
        try:
            # Released here: the traceback of an error would keep the RAM from being unmapped.
            with self.ram.bytes[start : start + PAGE_SIZE] as buffer:
                self.source.read_into(start, buffer)
        except BaseException as error:
            let_go(error)
            fill.error = error if isinstance(error, Exception) else None
            self._settle(page, fill, filled=False)
            raise
        try:
            self.view.bring_in(start, PAGE_SIZE)
        finally:
            self._settle(page, fill, filled=True)
        return True

    def bring_in_range(self, offset: int, size: int) -> int:
        """:meth:`bring_in` for every page of a range; how many had to be filled."""
        first = offset // PAGE_SIZE
        last = (offset + size - 1) // PAGE_SIZE
        return sum(self.bring_in(page * PAGE_SIZE) for page in range(first, last + 1))

    def is_in(self, offset: int) -> bool:
        """Whether the page has been brought in."""
        return bool(self._filled[offset // PAGE_SIZE])

    def share(self, claims: Callable[[bytearray, Collection[int]], Claims]) -> Claims:
        """From now on others fill pages too, who hold no lock of ours.  The first call decides.

        ``claims`` is given a byte for each page, 1 once it is filled, which those others set as
        well; and the pages that are being filled, which are taken.
        """
        with self._changed:
            if self._claims is None:
                self._claims = claims(self._filled, self._fills.keys())
            return self._claims

    def credit(self, pages: int) -> None:
        """Others have brought so many pages in."""
        with self._changed:
            self.pages_in += pages

    def _claim(self, page: int) -> _Fill | None:
        """The page is the caller's to fill; or ``None``: it is filled.

        Raises the error of the thread that was filling it and could not.
        """
        fill = self._claim_from_threads(page)
        if fill is not None and fill.claims is not None:
            # Who shares copies a page and is done: it is not worth being woken for.
            while not fill.claims.take(page):
                if self._filled[page]:
                    self._settle(page, fill, filled=True, ours=False)
                    return None
                time.sleep(_PAUSE)
        return fill

    def _claim_from_threads(self, page: int) -> _Fill | None:
        """The same among Python's threads, who share by a lock."""
        with self._changed:
            while not self._filled[page]:
                fill = self._fills.get(page)
                if fill is None:
                    fill = self._fills[page] = _Fill(self._claims)
                    return fill
                self._waiting += 1
                while not fill.over:
                    self._changed.wait()
                self._waiting -= 1
                if fill.error is not None:
                    raise fill.error
            return None

    def _settle(self, page: int, fill: _Fill, *, filled: bool, ours: bool = True) -> None:
        with self._changed:
            self._filled[page] = filled
            self.pages_in += filled and ours
            if not filled and self._claims is not None:
                self._claims.give_up(page)
            fill.over = True
            del self._fills[page]
            if self._waiting:
                self._changed.notify_all()
