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


class _Fill:
    """A page being filled by one thread, and what the others who need it wait for."""

    __slots__ = ("error", "over")

    def __init__(self) -> None:
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
        self._source = source
        self._filled = bytearray(ram.pages)
        self._fills: dict[int, _Fill] = {}
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
        fill = self._claim(page)
        if fill is None:
            # The host may have dropped the page, and whoever sleeps in it must be woken.
            self.view.bring_in(start, PAGE_SIZE)
            return False
        try:
            # Released here: the traceback of an error would keep the RAM from being unmapped.
            with self.ram.bytes[start : start + PAGE_SIZE] as buffer:
                self._source.read_into(start, buffer)
        except BaseException as error:
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

    def _claim(self, page: int) -> _Fill | None:
        """The page is the caller's to fill; or ``None``: it is filled.

        Raises the error of the thread that was filling it and could not.
        """
        with self._changed:
            while not self._filled[page]:
                fill = self._fills.get(page)
                if fill is None:
                    fill = self._fills[page] = _Fill()
                    return fill
                self._waiting += 1
                while not fill.over:
                    self._changed.wait()
                self._waiting -= 1
                if fill.error is not None:
                    raise fill.error
            return None

    def _settle(self, page: int, fill: _Fill, *, filled: bool) -> None:
        with self._changed:
            self._filled[page] = filled
            self.pages_in += filled
            fill.over = True
            del self._fills[page]
            if self._waiting:
                self._changed.notify_all()
