"""What the kernel tells the real KVM through its mmu_notifiers, told to the software one.

A KVM keeps second-stage mappings to host pages that the host may take away at any time.  In the
kernel, whoever is about to unmap or write-protect part of an address space calls every notifier
registered with that ``mm`` (``mm/mmu_notifier.c``): ``invalidate_range_start`` before the page
tables change, ``invalidate_range_end`` after.  KVM's start callback removes its own mappings of the
range and raises ``mmu_invalidate_in_progress``; its end callback lowers that and advances
``mmu_invalidate_seq``.  A page fault reads the sequence number before it looks the host page up,
and starts over if there was an invalidation since (``mmu_invalidate_retry_gfn``).  So no mapping to
a page that is gone can be installed, though the page fault and the unmapping hold no common lock.

The software KVM is not in the kernel and hears none of this.  Therefore every wrapper in this room
that unmaps or write-protects host pages - :class:`~guestfault.linux.mapping.Mapping`'s ``protect``,
``discard`` and ``close``, :class:`~guestfault.linux.memfd.Memfd`'s ``punch_hole`` and ``truncate``,
:class:`~guestfault.linux.userfaultfd.Userfaultfd`'s ``writeprotect`` and ``move`` - does it inside
:func:`invalidating`.  Bringing a page *in* invalidates nothing and is not told, here as there.
What other code in the process does to its mappings goes unheard, and so does the reclaim of pages.

The chain is one per process, as the kernel's is one per ``mm``.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

__all__ = ["MmuNotifier", "invalidating", "register", "unregister"]


class MmuNotifier(Protocol):
    """One who keeps mappings to this process's pages.  ``struct mmu_notifier_ops``.

    ``start`` and ``end`` are host virtual addresses, ``end`` exclusive.  Calls for different ranges
    may overlap in time and come from different threads; for one invalidation, ``end`` follows
    ``start``, on the same thread save for the case told in :func:`register`.  A callback must not
    raise, must not wait for a guest page, and must not call :func:`register` or :func:`unregister`.
    """

    def invalidate_range_start(self, start: int, end: int) -> None:
        """The pages are about to go: drop every mapping to them, and install no new one."""

    def invalidate_range_end(self, start: int, end: int) -> None:
        """They are gone: page faults that began before this must start over."""


@dataclass(slots=True, eq=False)
class _Invalidation:
    """A range between its start and its end, and those who must still hear the end."""

    start: int
    end: int
    owed: list[MmuNotifier] = field(default_factory=list)


_lock = threading.Lock()
_chain: list[MmuNotifier] = []
_under_way: list[_Invalidation] = []


def register(notifier: MmuNotifier) -> None:
    """Add a notifier to the chain; it stays until :func:`unregister`.

    Invalidations that are already under way are told to it at once, by this thread, and their end
    by the thread that runs them.  The kernel comes to the same by letting none be under way
    meanwhile (``mm_take_all_locks``).  So from here on the notifier may install mappings.
    """
    with _lock:
        _chain.append(notifier)
        for invalidation in _under_way:
            notifier.invalidate_range_start(invalidation.start, invalidation.end)
            invalidation.owed.append(notifier)


def unregister(notifier: MmuNotifier) -> None:
    """Take a notifier off the chain; :class:`ValueError` if it is not on it.

    It still hears the end of an invalidation whose start it heard, on the thread that runs it.
    """
    with _lock:
        _chain.remove(notifier)


@contextmanager
def invalidating(start: int, end: int) -> Iterator[None]:
    """Unmap or write-protect ``[start, end)`` inside this, whether or not it will succeed.

    Every notifier hears the start before the body runs and the end after it, in the order of the
    chain, and also when the body raises.
    """
    invalidation = _Invalidation(start, end)
    with _lock:
        chain = tuple(_chain)
        _under_way.append(invalidation)
    try:
        for notifier in chain:
            invalidation.owed.append(notifier)
            notifier.invalidate_range_start(start, end)
        yield
    finally:
        with _lock:
            _under_way.remove(invalidation)
        for notifier in invalidation.owed:
            notifier.invalidate_range_end(start, end)
