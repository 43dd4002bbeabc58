"""A view whose pages KVM is told by a bitmap not to touch: KVM Userfault.

For each memory slot userspace keeps a bit for each page, in memory that KVM reads at every guest
fault.  While the bit is set the fault comes back as an exit, whether the page is there or not; once
it is clear, KVM looks the page up as it always has.  So bringing a page in is two steps here: the
page, then its bit.

The bitmap is looked at by the guest's own faults only.  Where KVM itself accesses the guest's
memory, in emulation or for the guest's clock, it would find a hole of shared memory and fill it
with zeros.  Therefore another view lies below, in which the same pages are absent for everybody,
and whose failures are as bare as without KVM Userfault (the series says so itself: userfaultfd is
still needed).
"""

from __future__ import annotations

import threading
from collections.abc import Iterable

from guestfault.linux.mapping import Mapping
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.view import GuestView

__all__ = ["Userfault"]

_WORD_BITS = 64
_BYTE = 8


class _Bitmap:
    """The bits of ``pages`` pages from page ``first`` of the RAM on, ``at`` bytes into the map."""

    def __init__(self, first: int, pages: int, at: int) -> None:
        self.first = first
        self.end = first + pages
        self.at = at


class Userfault:
    """Absent is what has its bit set, and is absent ``below`` too.

    ``ranges`` are the parts of the RAM that memory slots will show, as (offset, size); each gets a
    bitmap of its own, all ones at first, whose address is :meth:`bitmap_of`.
    """

    def __init__(self, ram: GuestRam, below: GuestView, ranges: Iterable[tuple[int, int]]) -> None:
        self._below = below
        self.name = f"KVM Userfault, over {below.name}"
        self._bitmaps: dict[int, _Bitmap] = {}
        size = 0
        for offset, length in ranges:
            pages = length // PAGE_SIZE
            self._bitmaps[offset] = _Bitmap(offset // PAGE_SIZE, pages, size)
            size += -(-pages // _WORD_BITS) * _WORD_BITS // _BYTE
        self._map = Mapping.anonymous(max(-(-size // PAGE_SIZE) * PAGE_SIZE, PAGE_SIZE))
        self._bits = self._map.view()
        self._bits[:size] = b"\xff" * size
        # KVM reads whole words and writes none; ours are the only writers.
        self._lock = threading.Lock()

    def bitmap_of(self, offset: int) -> int:
        """The address of the bitmap for the slot that shows the RAM from ``offset`` on."""
        return self._map.address + self._bitmaps[offset].at

    def bring_in(self, offset: int, size: int) -> None:
        """See :meth:`GuestView.bring_in`."""
        self._below.bring_in(offset, size)
        first, end = offset // PAGE_SIZE, (offset + size) // PAGE_SIZE
        with self._lock:
            for bitmap in self._bitmaps.values():
                for page in range(max(first, bitmap.first), min(end, bitmap.end)):
                    bit = page - bitmap.first
                    self._bits[bitmap.at + bit // _BYTE] &= ~(1 << bit % _BYTE) & 0xFF

    def is_set(self, offset: int) -> bool:
        """Whether a guest's access to the page that holds ``offset`` is to exit."""
        page = offset // PAGE_SIZE
        return any(
            bool(self._bits[b.at + (page - b.first) // _BYTE] >> (page - b.first) % _BYTE & 1)
            for b in self._bitmaps.values()
            if b.first <= page < b.end
        )

    def shut(self) -> None:
        """See :meth:`GuestView.shut`."""
        self._below.shut()

    def reopen(self) -> None:
        """See :meth:`GuestView.reopen`."""
        self._below.reopen()

    def close(self) -> None:
        """Give up the bitmap, and the means of the view below."""
        self._map.close()
        self._below.close()
