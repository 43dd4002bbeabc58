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

What would *sleep* must not stop the thread of all when it is a coroutine.  It says so with
:func:`wait`, sleeps in a :class:`Sleeper` until somebody wakes it, or waits its turn at a
:class:`Mutex`: whether that is a real sleep or the scheduler's business is decided here and nowhere
else.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Protocol

__all__ = [
    "Mutex",
    "Scheduler",
    "Sleeper",
    "cond_resched",
    "preemption_point",
    "scheduled_by",
    "wait",
]

_PAUSE = 20e-6


class Scheduler(Protocol):
    """Who decides, at each point, which of the threads goes on."""

    def point(self, name: str, shared: Hashable, write: bool) -> None:
        """The calling thread is about to access ``shared``; returns when it may."""

    def wait(
        self, name: str, shared: Hashable, until: Callable[[], bool], acts: bool = False
    ) -> None:
        """The calling thread cannot go on before ``until()``, which depends on ``shared``.

        If it ``acts``, it is to be called after each write of ``shared``; else when there is need
        to know.
        """


scheduler: Scheduler | None = None
"""Who it is, if anybody.  On the hot path, where a call is felt, a point stands behind the question
whether there is one: ``if preempt.scheduler is not None``."""


def preemption_point(name: str, shared: Hashable, write: bool = False) -> None:
    """The calling thread is about to read, or ``write``, what other threads also access.

    ``name`` begins with the function that it stands in, under Linux's name.
    """
    if scheduler is not None:
        scheduler.point(name, shared, write)


def wait(name: str, shared: Hashable, until: Callable[[], bool], *, acts: bool = False) -> None:
    """Return once ``until()``; what it depends on is ``shared``.

    For waits that are short, or rare: without a scheduler it looks again every 20 microseconds.
    ``until`` changes nothing, unless it ``acts``: then it is called again and again, at least after
    whatever others do to ``shared``, and what it does must do no harm when repeated.
    """
    if scheduler is not None:
        scheduler.wait(name, shared, until, acts)
        return
    while not until():
        time.sleep(_PAUSE)


def cond_resched(shared: Hashable, until: Callable[[], bool]) -> None:
    """Give way to others: the calling thread tries again, in vain before ``until()``.

    It comes back at once and tries.  With a scheduler it waits, for a trial that is known to be in
    vain is nothing but a longer schedule.
    """
    if scheduler is not None:
        scheduler.wait("cond_resched", shared, until)
    else:
        time.sleep(0)


class Sleeper:
    """Where one thread sleeps until others wake it: ``struct rcuwait``.

    The sleeper calls :meth:`prepare`, *then* looks whether there is reason to sleep, then calls
    :meth:`sleep`.  Whoever gives a reason to be awake gives it first and then calls
    :meth:`wake_up`, which is not lost: a :meth:`sleep` that comes later returns at once.

    ``shared`` names it, for the preemption points.
    """

    def __init__(self, shared: Hashable) -> None:
        self._shared = shared
        # Held unless somebody has called since prepare().  A bare lock, because wake_up() must be
        # possible in a signal handler, in the midst of any of these methods on the same thread.
        self._asleep = threading.Lock()
        self._asleep.acquire()

    def prepare(self, name: str) -> None:
        """From now on a call counts."""
        preemption_point(name, self._shared, True)
        self._asleep.acquire(blocking=False)

    def sleep(self, name: str) -> None:
        """Sleep until somebody has called since :meth:`prepare`."""
        if scheduler is not None:
            scheduler.wait(name, self._shared, self._called)
        else:
            self._asleep.acquire()

    def wake_up(self, name: str) -> None:
        """From any thread, and from a signal handler: end the sleep, or the one that comes next."""
        preemption_point(name, self._shared, True)
        try:  # noqa: SIM105 - it takes a third of the time
            self._asleep.release()
        except RuntimeError:
            pass  # somebody else has called already

    def _called(self) -> bool:
        return not self._asleep.locked()


class Mutex:
    """A lock that may be held across preemption points: a kernel mutex, which sleeps.

    A :class:`threading.Lock` may be held only where no point is reached.
    """

    def __init__(self, shared: Hashable) -> None:
        self._shared = shared
        self._lock = threading.Lock()

    def __enter__(self) -> None:
        if scheduler is not None:
            scheduler.wait("mutex_lock", self._shared, self._is_free)
            if not self._lock.acquire(blocking=False):
                raise RuntimeError("a thread outside the scheduler holds a mutex of those inside")
        else:
            self._lock.acquire()

    def __exit__(self, *_: object) -> None:
        if scheduler is not None:
            scheduler.point("mutex_unlock", self._shared, True)
        self._lock.release()

    def _is_free(self) -> bool:
        return not self._lock.locked()


@contextmanager
def scheduled_by(decides: Scheduler) -> Iterator[None]:
    """Have this one decide, in the whole process, until the context is left."""
    global scheduler
    before, scheduler = scheduler, decides
    try:
        yield
    finally:
        scheduler = before
