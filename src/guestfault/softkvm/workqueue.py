"""Work that must not hold up whoever found it: ``schedule_work``, on daemon threads.

A work may sleep for as long as a page of memory takes to come, so one that sleeps must not keep
another from beginning: there are as many threads as there are works under way, up to the number
that a Linux workqueue has (``WQ_DFL_ACTIVE``).  A thread that finds nothing more to do ends after a
moment.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable

__all__ = ["Workqueue"]

_MAX_ACTIVE = 256
_IDLE = 1.0  # seconds that a thread waits for more
_GRACE = 0.5  # seconds that close() gives to works that are about to end


class Workqueue:
    """A queue of works of one VM and the threads that do them."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._works: deque[Callable[[], None]] = deque()
        self._threads: set[threading.Thread] = set()
        self._idle = 0
        self._closed = False

    def schedule_work(self, work: Callable[[], None]) -> None:
        """Have ``work`` done soon, on another thread.  After :meth:`close` it is not done."""
        with self._changed:
            if self._closed:
                return
            self._works.append(work)
            if self._idle < len(self._works) and len(self._threads) < _MAX_ACTIVE:
                thread = threading.Thread(target=self._run, name="softkvm-worker", daemon=True)
                self._threads.add(thread)
                thread.start()
            else:
                self._changed.notify()

    def close(self) -> None:
        """Drop what has not begun, and let what has begun end.  Again is harmless.

        A work that sleeps in userfaultfd is not waited for: its thread ends when the page comes,
        or fails because its range is unregistered or unmapped.
        """
        with self._changed:
            self._closed = True
            self._works.clear()
            self._changed.notify_all()
            threads = list(self._threads)
        deadline = time.monotonic() + _GRACE
        for thread in threads:
            if thread is not threading.current_thread():
                thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        try:
            while (work := self._next()) is not None:
                work()
        finally:
            with self._changed:
                self._threads.discard(threading.current_thread())

    def _next(self) -> Callable[[], None] | None:
        with self._changed:
            self._idle += 1
            more = self._changed.wait_for(lambda: self._works or self._closed, _IDLE)
            self._idle -= 1
            if more and not self._closed:
                return self._works.popleft()
            return None
