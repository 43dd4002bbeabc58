"""The pager: every page comes in once, whole, whoever asks first.

A page is absent, being filled, or filled.  The thread that finds it absent fills it from the source
through the host view, and only then lets it into the guest view; whoever else needs it meanwhile
waits for that thread.  So a page is read from the source once, is never seen half filled, and is
never written again after a guest may have written to it.

Among Python's threads a lock decides who is first.  A compiled loop
(:mod:`~guestfault.paging.hot`) holds no lock of Python's, so once there is one, a thread that has
won a page here must win it from the loops as well: :meth:`Pager.share`.

Pages come in *ahead*, too, before anybody has asked (:meth:`Pager.bring_in_ahead`).  They take the
same road, and keep nobody from it: who goes ahead waits for no page, and passes over those that are
somebody else's; and who waits for a page that cannot be had so, tries that page himself.  A few of
them are withheld, to find out what this is worth (:mod:`~guestfault.paging.ahead`).

It fails closed.  If the source fails, the page goes back to absent, everyone who waited gets the
:class:`~guestfault.paging.source.base.SourceError`, and the guest view stays shut on it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection
from typing import Protocol

from guestfault.errors import KernelError
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.view import GuestView
from guestfault.paging.ahead import EVERY, IN, Ahead, AheadCount, draw
from guestfault.paging.source.base import (
    PageSource,
    SourceError,
    SourceInterruptedError,
    let_go,
)

__all__ = ["Claims", "Pager"]

_PAUSE = 20e-6
_MARK = bytearray([IN])
_NONE = range(0)


class Claims(Protocol):
    """What Python and the compiled loops agree by (:mod:`guestfault.paging.claims`)."""

    def take(self, page: int) -> bool:
        """Whether the page is the caller's to fill, from now on."""

    def give_up(self, page: int) -> None:
        """It is nobody's again; nothing of it was written."""

    def release(self, page: int, why: int) -> bool:
        """A page that was withheld for a reason is no longer; whether this call did it."""


class _Fill:
    """Pages being filled by one thread, and what the others who need one of them wait for."""

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
        """Pages that were filled, for whatever reason."""
        self.counts = {why: AheadCount() for why in Ahead}
        """Those of them that were filled without being asked for."""

    @property
    def ahead(self) -> int:
        """How many pages were filled without being asked for."""
        return sum(count.pages for count in self.counts.values())

    def bring_in(self, offset: int) -> bool:
        """Make the page that holds ``offset`` accessible; whether it was not.

        Raises :class:`~guestfault.paging.source.base.SourceError` if it cannot be had, with the
        page absent as before, and :class:`~guestfault.errors.KernelError` if it cannot be let in.
        """
        return bool(self.bring_in_around(offset, _NONE))

    def bring_in_around(self, offset: int, window: range) -> range:
        """:meth:`bring_in`, and with the page those on either side of it, in one piece.

        They are pages of ``window`` (page numbers), and as many as are absent and nobody's up to
        the next that is not; none is waited for.  Where all cannot be had together, the page that
        was asked for is tried alone.  Returns which were not accessible and are: none if the page
        was; of the others, one may have been withheld.
        """
        page = offset // PAGE_SIZE
        if self._claim(page) is None:
            wanted = self._filled[page] != IN and self._release(page)
            # The host may have dropped the page, and whoever sleeps in it must be woken.
            self.view.bring_in(page * PAGE_SIZE, PAGE_SIZE)
            return range(page, page + wanted)
        run = range(page, page + 1)
        if page in window:
            run = self._widen(run, window)
        try:
            self._fill(run, Ahead.AROUND, page)
        except SourceInterruptedError:
            raise
        except (SourceError, KernelError):
            if len(run) == 1:
                raise
            return self.bring_in_around(offset, _NONE)
        return run

    def bring_in_range(self, offset: int, size: int) -> int:
        """:meth:`bring_in` for every page of a range; how many were not accessible."""
        first = offset // PAGE_SIZE
        last = (offset + size - 1) // PAGE_SIZE
        return sum(self.bring_in(page * PAGE_SIZE) for page in range(first, last + 1))

    def bring_in_ahead(self, first: int, pages: int, why: Ahead = Ahead.PREFETCH) -> int:
        """Bring in, of ``pages`` pages from number ``first`` on, those that are absent.

        Returns how many were filled, those that were withheld included.  Waits for nobody: a page
        that is being filled already is left to who fills it.  Neighbours are read from the source
        with one read and let in at once, up to 1 MiB of them, for who needs one of them meanwhile
        waits for all.  Raises what :meth:`bring_in` does, with those that failed absent as before;
        who waits for one of them is not told of that, and tries the page alone.
        """
        end = first + pages
        filled = 0
        while run := self._claim_run(first, end):
            self._fill(run, why)
            filled += len(run)
            first = run.stop
        return filled

    def is_in(self, offset: int) -> bool:
        """Whether the page's bytes are there."""
        return bool(self._filled[offset // PAGE_SIZE])

    def share(self, claims: Callable[[bytearray, Collection[int]], Claims]) -> Claims:
        """From now on others fill pages too, who hold no lock of ours.  The first call decides.

        ``claims`` is given a byte for each page, not 0 once it is filled, which those others set as
        well; and the pages that are being filled, which are taken.
        """
        with self._changed:
            if self._claims is None:
                self._claims = claims(self._filled, self._fills.keys())
            return self._claims

    def credit(self, pages: int, around: AheadCount | None = None) -> None:
        """Others have brought so many pages in; ``around``: some of them, because of the rest."""
        with self._changed:
            self.pages_in += pages
            if around is not None:
                self.counts[Ahead.AROUND].add(around)

    def _claim(self, page: int) -> _Fill | None:
        """The page is the caller's to fill; or ``None``: it is filled.

        Raises the error of the thread that was filling it and could not.
        """
        fill = self._claim_from_threads(page)
        if fill is not None and fill.claims is not None:
            # Who shares copies a page and is done: it is not worth being woken for.
            while not fill.claims.take(page):
                if self._filled[page]:
                    with self._changed:
                        self._over(range(page, page + 1))
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

    def _release(self, page: int) -> bool:
        """Whether the page was withheld; it no longer is, and is still to be let in."""
        with self._changed:
            why = self._filled[page]
            if why == IN or (self._claims is not None and not self._claims.release(page, why)):
                return False
            self._filled[page] = IN
            self.counts[Ahead(why)].wanted += 1
            return True

    def _widen(self, run: range, window: range) -> range:
        """``run``, which is the caller's, with its neighbours, which are from now on."""
        with self._changed:
            first, end = run.start, run.stop
            while end < window.stop and self._take_free(end):
                end += 1
            while first > window.start and self._take_free(first - 1):
                first -= 1
            more = _Fill(None)
            self._fills.update((page, more) for page in range(first, end) if page not in run)
            return range(first, end)

    def _claim_run(self, first: int, end: int) -> range:
        """The first pages in a row that were absent and nobody's: the caller's to fill from now on.

        An empty range if there are none.
        """
        with self._changed:
            start = next((page for page in range(first, end) if self._take_free(page)), end)
            stop = start + (start < end)
            end = min(end, start + EVERY)  # not to withhold fewer than one in so many
            while stop < end and self._take_free(stop):
                stop += 1
            run = range(start, stop)
            self._fills.update(dict.fromkeys(run, _Fill(None)))
            return run

    def _take_free(self, page: int) -> bool:
        """With the lock: whether the page was absent and nobody's."""
        if self._filled[page] or page in self._fills:
            return False
        return self._claims is None or self._claims.take(page)

    def _fill(self, run: range, why: Ahead, asked: int | None = None) -> None:
        """Fill pages that are the caller's, and let them in; all but ``asked`` are ahead."""
        start, size = run.start * PAGE_SIZE, len(run) * PAGE_SIZE
        ahead = len(run) - (asked is not None)
        try:
            # Released here: the traceback of an error would keep the RAM from being unmapped.
            with self.ram.bytes[start : start + size] as buffer:
                self.source.read_into(start, buffer)
        except BaseException as error:
            let_go(error)
            self._undo(run, error if isinstance(error, Exception) and not ahead else None)
            raise
        withheld = draw(run, asked) if ahead else None
        try:
            if withheld is None:
                self.view.bring_in(start, size)
            else:
                self._let_in_but(run, withheld)
        finally:
            self._settle(run, why, ahead, withheld)

    def _let_in_but(self, run: range, withheld: int) -> None:
        for part in (range(run.start, withheld), range(withheld + 1, run.stop)):
            if part:
                self.view.bring_in(part.start * PAGE_SIZE, len(part) * PAGE_SIZE)

    def _undo(self, run: range, error: Exception | None) -> None:
        """They could not be filled, and are nobody's again."""
        with self._changed:
            for page in run:
                if self._claims is not None:
                    self._claims.give_up(page)
                self._fills[page].error = error
            self._over(run)

    def _settle(self, run: range, why: Ahead, ahead: int, withheld: int | None) -> None:
        """They are filled."""
        marks = _MARK * len(run)
        if withheld is not None:
            marks[withheld - run.start] = why
        with self._changed:
            self._filled[run.start : run.stop] = marks
            self.pages_in += len(run)
            if ahead:
                self.counts[why].add(AheadCount(ahead, int(withheld is not None)))
            self._over(run)

    def _over(self, run: range) -> None:
        """With the lock: nobody is filling them any more."""
        for page in run:
            self._fills.pop(page).over = True
        if self._waiting:
            self._changed.notify_all()
