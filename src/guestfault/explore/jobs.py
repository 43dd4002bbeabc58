"""Does searches in several processes, and comes to the same result with any number of them.

A search is a sequence of rounds of parts (:mod:`guestfault.explore.search`), and how a round is cut
does not depend on how many processes there are.  So each part that could be done now is given to a
process as one becomes free, and a round's results are merged in the round's order once they are all
there.  While there are more searches than processes that comes to one search per process; a search
that is large is cut, and its parts keep the others busy.

Each part has a process of its own, forked from this one: it inherits what its search knows by then,
scenarios need not be pickled, and it leaves nothing behind.  Workers end with the process that
started them, however that ends.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import pickle
import selectors
import signal
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from guestfault.explore.part import Part, PartResult
from guestfault.explore.schedule import WorldDefect
from guestfault.explore.search import Search

__all__ = ["do_searches"]

_PR_SET_PDEATHSIG = 1
_CHUNK = 1 << 20


def do_searches(
    searches: Sequence[Search], jobs: int, progress: Callable[[Search], None] | None = None
) -> None:
    """Do all searches to their end, in ``jobs`` processes; with one, in this process.

    ``progress`` is called with a search after each of its rounds.  Raises
    :class:`~guestfault.explore.schedule.WorldDefect`.
    """
    if jobs > 1:
        with _Workers(jobs, progress) as workers:
            workers.do(searches)
        return
    for search in searches:
        while parts := search.round():
            search.merge([search.do(part) for part in parts])
            if progress is not None:
                progress(search)


@dataclass(slots=True)
class _Round:
    """A round under way: its results in their places, as they come."""

    search: Search
    results: list[PartResult | None]
    missing: int


@dataclass(slots=True)
class _Worker:
    """A process that does one part, and what it has written of its result so far."""

    pid: int
    round: _Round
    place: int
    answer: list[bytes] = field(default_factory=list)


class _Workers:
    """The processes, no more than ``jobs`` at a time."""

    def __init__(self, jobs: int, progress: Callable[[Search], None] | None) -> None:
        self._jobs = jobs
        self._progress = progress
        self._selector = selectors.DefaultSelector()
        self._workers: dict[int, _Worker] = {}  # by the end of the pipe that we read
        self._parts: deque[tuple[_Round, int, Part]] = deque()

    def __enter__(self) -> _Workers:
        return self

    def __exit__(self, *_: object) -> None:
        for fd, worker in self._workers.items():
            with contextlib.suppress(ProcessLookupError):
                os.kill(worker.pid, signal.SIGKILL)
            os.waitpid(worker.pid, 0)
            os.close(fd)
        self._workers.clear()
        self._selector.close()

    def do(self, searches: Sequence[Search]) -> None:
        """Do them all."""
        waiting = deque(searches)
        while waiting or self._parts or self._workers:
            # Parts of rounds under way go first: a round that is done holds no memory.
            while waiting and len(self._parts) + len(self._workers) < self._jobs:
                self._begin_round(waiting.popleft())
            while self._parts and len(self._workers) < self._jobs:
                self._start(*self._parts.popleft())
            if self._workers:
                for key, _ in self._selector.select():
                    self._read(key.fd)

    def _begin_round(self, search: Search) -> None:
        parts = search.round()
        a_round = _Round(search, [None] * len(parts), len(parts))
        self._parts.extend((a_round, place, part) for place, part in enumerate(parts))

    def _start(self, a_round: _Round, place: int, part: Part) -> None:
        parent = os.getpid()
        reader, writer = os.pipe()
        # A Ctrl-C in the midst of this would leave a worker behind that nobody knows of, or be
        # swallowed by one of the functions that run after a fork.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        try:
            pid = os.fork()
            if pid == 0:
                os.close(reader)
                _be_worker(parent, writer, a_round.search, part, mask)
            os.close(writer)
            self._workers[reader] = _Worker(pid, a_round, place)
            self._selector.register(reader, selectors.EVENT_READ)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _read(self, fd: int) -> None:
        worker = self._workers[fd]
        chunk = os.read(fd, _CHUNK)
        if chunk:
            worker.answer.append(chunk)
            return
        _, status = os.waitpid(worker.pid, 0)
        del self._workers[fd]
        self._selector.unregister(fd)
        os.close(fd)
        a_round = worker.round
        a_round.results[worker.place] = _answer(a_round.search, worker, status)
        a_round.missing -= 1
        if a_round.missing == 0:
            a_round.search.merge([result for result in a_round.results if result is not None])
            if self._progress is not None:
                self._progress(a_round.search)
            self._begin_round(a_round.search)


def _answer(search: Search, worker: _Worker, status: int) -> PartResult:
    if status != 0:
        where = f"{search.scenario.name}, {search.dialect.name}"
        code = os.waitstatus_to_exitcode(status)
        raise WorldDefect(where, f"its worker ended with {code} before it was through")
    answer = pickle.loads(b"".join(worker.answer))
    if isinstance(answer, WorldDefect):
        raise answer
    assert isinstance(answer, PartResult)
    return answer


def _be_worker(parent: int, writer: int, search: Search, part: Part, mask: set[int]) -> None:
    """In the child: do the part, write the answer, and end without the parent's clean-ups."""
    status = 1
    try:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() == parent:  # else it has gone in the meantime
            answer: PartResult | WorldDefect
            try:
                answer = search.do(part)
            except WorldDefect as defect:
                answer = defect
            with os.fdopen(writer, "wb") as pipe:
                pickle.dump(answer, pipe, pickle.HIGHEST_PROTOCOL)
            status = 0
    finally:
        os._exit(status)
