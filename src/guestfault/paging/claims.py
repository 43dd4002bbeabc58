"""Who fills a page, between Python's threads and the compiled loops: a byte for each page.

0: nobody.  1: somebody does, or has.  It is taken by an atomic compare-and-exchange and given back
only by one who has written nothing, so a page is written by one, and once.  The taker then says
that it is filled in the pager's own bytes.
"""

from __future__ import annotations

import ctypes
from collections.abc import Collection

from guestfault.paging.hot_native import compare_exchange, compiled, store8

__all__ = ["SharedClaims"]


class SharedClaims:
    """The claims on the pages of a pager; ``filled`` and ``being_filled`` are what it says of them.

    ``filled_at`` and ``at`` are the addresses of a byte for each page, ``filled``'s and the
    claims', good for as long as this object lives.
    """

    def __init__(self, filled: bytearray, being_filled: Collection[int]) -> None:
        taken = bytearray(filled)
        for page in being_filled:
            taken[page] = 1
        kind = ctypes.c_uint8 * len(filled)
        # An export pins a bytearray's memory where it is.
        self._pins = kind.from_buffer(filled), kind.from_buffer(taken)
        self.filled_at, self.at = map(ctypes.addressof, self._pins)

    def take(self, page: int) -> bool:
        """See :class:`~guestfault.paging.pager.Claims`."""
        return bool(_take(self.at + page))

    def give_up(self, page: int) -> None:
        """See :class:`~guestfault.paging.pager.Claims`."""
        _give_up(self.at + page)

    def release(self, page: int, why: int) -> bool:
        """See :class:`~guestfault.paging.pager.Claims`."""
        return bool(_release(self.filled_at + page, why))


@compiled
def _take(at: int) -> bool:
    taken: bool = compare_exchange(at, 0, 1)
    return taken


@compiled
def _give_up(at: int) -> None:
    store8(at, 0)


@compiled
def _release(at: int, why: int) -> bool:
    released: bool = compare_exchange(at, why, 1)
    return released
