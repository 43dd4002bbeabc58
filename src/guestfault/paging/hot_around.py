"""Fault-around in the compiled loop: :mod:`~guestfault.paging.around`, word for word, in words.

The streams of a vCPU stand in its row from :data:`~guestfault.paging.hot_words.STREAMS` on, the one
gone on with last first; those of the plain loop are others, for the two hardly ever take turns.
"""

from __future__ import annotations

from typing import Final

from guestfault.paging import hot_words as at
from guestfault.paging.ahead import EVERY
from guestfault.paging.around import RANK
from guestfault.paging.hot_native import compiled
from guestfault.paging.hot_words import Words

__all__ = ["came_in", "draw", "widest"]

_SHIFT: Final = 12
_NONE: Final = -1
_EVERY: Final = EVERY
_ROWS_END: Final = at.STREAMS + at.STREAM_COUNT * at.STREAM_WORDS
_NEW_ROW: Final = at.STREAMS + RANK * at.STREAM_WORDS


@compiled
def widest(w: Words, page: int) -> tuple[int, int]:
    """The window of a fault on an absent page, first and end.  Then call :func:`came_in`."""
    w[at.GOES_ON] = 0
    if w[at.WINDOW] == 1 or not _go_on(w, page):
        return page, page + 1
    first, end = w[at.STREAMS], w[at.STREAMS + 1]
    if first <= page < end:
        return page, page + 1
    w[at.GOES_ON] = 1
    exact = page == end or page == first - 1
    size = w[at.STREAMS + 2]
    size = min(2 * size, w[at.WINDOW]) if exact else max(size >> 1, 1)
    w[at.STREAMS + 2] = size
    first = page & -size
    end = first + size
    row = at.SLOT_TABLE
    for _ in range(w[at.SLOTS]):
        least = (w[row] + w[row + 2]) >> _SHIFT
        most = (w[row + 1] + w[row + 2]) >> _SHIFT
        if least <= page < most:
            return max(first, least), min(end, most)
        row += at.SLOT_WORDS
    return page, page + 1


@compiled
def came_in(w: Words, first: int, end: int) -> None:
    """Where the stream is, now that the fault has brought these in."""
    if not w[at.GOES_ON]:
        return
    if end - first < 2:
        w[at.STREAMS + 2] = max(w[at.STREAMS + 2] >> 1, 1)
    w[at.STREAMS], w[at.STREAMS + 1] = first, end


@compiled
def _go_on(w: Words, page: int) -> bool:
    """Whether a fault goes on with a stream, which is the first then; or there is a new one."""
    row = at.STREAMS
    while row < _ROWS_END:
        size = w[row + 2]
        if w[row] - size <= page < w[row + 1] + size:
            break
        row += at.STREAM_WORDS
    found = row < _ROWS_END
    first, end, size, place = page, page + 1, 1, _NEW_ROW
    if found:
        first, end, size, place = w[row], w[row + 1], w[row + 2], at.STREAMS
    else:
        row -= at.STREAM_WORDS
    while row > place:
        for word in range(row, row + at.STREAM_WORDS):
            w[word] = w[word - at.STREAM_WORDS]
        row -= at.STREAM_WORDS
    w[place], w[place + 1], w[place + 2] = first, end, size
    return found


@compiled
def draw(w: Words, first: int, end: int, asked: int) -> int:
    """The page that is to be withheld, or -1; :func:`guestfault.paging.ahead.draw`."""
    if end - first < 2:
        return _NONE
    # The constants are Knuth's (MMIX); the high bits are the ones that are good.
    w[at.LOT] = w[at.LOT] * 6364136223846793005 + 1442695040888963407
    page = first + (w[at.LOT] >> 40 & _EVERY - 1)
    page += page >= asked
    return page if page < end else _NONE
