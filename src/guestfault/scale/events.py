"""A discrete-event simulator: a clock, what is due, and resources that serve one after the other.

Time is in microseconds.  What happens is a callback; a *process* is a chain of them.
"""

from __future__ import annotations

import heapq
import random
from collections import deque
from collections.abc import Callable

__all__ = ["Clock", "Serial"]

Callback = Callable[[], None]


class Clock:
    """What is due, and when.  The same ``seed`` gives the same run."""

    def __init__(self, seed: int = 1) -> None:
        self.now = 0.0
        self._due: list[tuple[float, int, Callback]] = []
        self._count = 0
        self._random = random.Random(seed)

    def after(self, delay: float, then: Callback) -> None:
        """Call ``then`` when ``delay`` has passed; calls for one instant come in their order."""
        self._count += 1
        heapq.heappush(self._due, (self.now + delay, self._count, then))

    def about(self, delay: float, then: Callback) -> None:
        """The same after half to one and a half of ``delay``: no two threads march in step."""
        self.after(delay * (0.5 + self._random.random()), then)

    def run(self, until: Callable[[], bool]) -> None:
        """Let things happen until ``until()``, or nothing is due any more."""
        due = self._due
        while due and not until():
            self.now, _, then = heapq.heappop(due)
            then()


class Serial:
    """Serves requests one at a time in the order of their coming: a lock, a contended cache line.

    ``hold(waiting)`` is how long it is held, given how many still wait.
    """

    __slots__ = ("_busy", "_clock", "_queue")

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._queue: deque[tuple[Callable[[int], float], Callback]] = deque()
        self._busy = False

    def request(self, hold: Callable[[int], float], then: Callback) -> None:
        """Have it for ``hold(waiting)``, and call ``then`` when it is over."""
        self._queue.append((hold, then))
        if not self._busy:
            self._serve()

    def _serve(self) -> None:
        self._busy = bool(self._queue)
        if self._busy:
            hold, then = self._queue.popleft()
            self._clock.after(hold(len(self._queue)), lambda: self._served(then))

    def _served(self, then: Callback) -> None:
        then()
        self._serve()
