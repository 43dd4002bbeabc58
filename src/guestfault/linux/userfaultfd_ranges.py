"""Where a fault of ours may be put to sleep by a userfaultfd of ours.

No system call says of one address whether it is registered, and ``/proc/self/smaps`` says it in
milliseconds.  So :class:`~guestfault.linux.userfaultfd.Userfaultfd` notes here what it registers.
What other code in the process registers is not known, and neither is whether a descriptor that was
handed out keeps a range registered after ours is closed.
"""

from __future__ import annotations

import threading

__all__ = ["forget", "note", "sleeps_at"]

_Range = tuple[int, int, int]  # start, end, descriptor

_lock = threading.Lock()
_ranges: tuple[_Range, ...] = ()  # replaced as a whole, so that it can be read without the lock


def note(fd: int, address: int, size: int) -> None:
    """Whoever touches a page that is missing there, sleeps."""
    global _ranges
    with _lock:
        _ranges = (*_ranges, (address, address + size, fd))


def forget(fd: int, address: int = 0, size: int = 1 << 64) -> None:
    """Not any more.  Without a range: nothing of the descriptor's."""
    global _ranges
    end = address + size
    with _lock:
        kept: list[_Range] = []
        for start, stop, owner in _ranges:
            if owner != fd or stop <= address or end <= start:
                kept.append((start, stop, owner))
                continue
            if start < address:
                kept.append((start, address, owner))
            if end < stop:
                kept.append((end, stop, owner))
        _ranges = tuple(kept)


def sleeps_at(address: int) -> bool:
    """Whether a fault at ``address`` may sleep until somebody resolves it."""
    return any(start <= address < end for start, end, _ in _ranges)
