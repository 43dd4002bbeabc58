"""Where another thread may come in between: the preemption points of the kernel half.

The fault path is lock-free in places, sleeps in others, and its whole difficulty is what happens in
between.  Each place where that matters is named here once, in the code itself::

    preemption_point("kvm_faultin_pfn: look the page up", ("page", hva))

To an ordinary run it is nothing: the threads are real and come in where they please.  Under
:mod:`guestfault.explore` all of them are coroutines of one thread, and a point is where the
scheduler decides who goes on.  Therefore every access to what threads share stands behind a point
that names it: ``shared`` is what is about to be read, or written if ``write``, and two steps that
have no such thing in common (or only read it) can be exchanged without anybody noticing.  A point
covers what follows it, up to the next one.

What would *sleep* says so with :func:`wait`, for a coroutine must not stop the thread of all.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = ["Scheduler", "preemption_point", "scheduled_by", "wait"]

_PAUSE = 20e-6


class Scheduler(Protocol):
    """Who decides, at each point, which of the threads goes on."""

    def point(self, name: str, shared: Hashable, write: bool) -> None:
        """The calling thread is about to access ``shared``; returns when it may."""

    def wait(self, name: str, shared: Hashable, until: Callable[[], bool]) -> None:
        """The calling thread cannot go on before ``until()``, which depends on ``shared``."""


_scheduler: Scheduler | None = None


def preemption_point(name: str, shared: Hashable, write: bool = False) -> None:
    """The calling thread is about to read, or ``write``, what other threads also access.

    ``name`` begins with the function that it stands in, under Linux's name.
    """
    if _scheduler is not None:
        _scheduler.point(name, shared, write)


def wait(name: str, shared: Hashable, until: Callable[[], bool]) -> None:
    """Return once ``until()``; what it depends on is ``shared``.

    For waits that are short, or rare: without a scheduler it looks again every 20 microseconds.
    """
    if _scheduler is not None:
        _scheduler.wait(name, shared, until)
        return
    while not until():
        time.sleep(_PAUSE)


@contextmanager
def scheduled_by(scheduler: Scheduler) -> Iterator[None]:
    """Have ``scheduler`` decide, in the whole process, until the context is left."""
    global _scheduler
    before, _scheduler = _scheduler, scheduler
    try:
        yield
    finally:
        _scheduler = before
