"""Pages brought in before the guest gets to them: by a recorded order, then all the rest.

On demand a guest waits for one page after the other.  With the order of an earlier run
(:mod:`~guestfault.paging.working_set`) a few threads go through the same pages ahead of it, and the
guest finds them there.  When the order is through, the rest of the memory can be *pushed*: in the
order of addresses, at a bounded rate, for as long as the guest runs.

**Never before who needs a page now.**  A page on demand is not queued behind these threads: whoever
faults reads it himself, at once, unless it is on its way already, and then it is nearer than a read
of its own would be.  A read is of at most :data:`READ` pages, so what is on its way is not long in
coming.  The push rests as long as it read whenever somebody had to ask for a page meanwhile.

**Why threads, and how many.**  Where the order jumps about, each page is a read of its own, and one
thread would bring in no more pages a second than the guest by itself: it is the reads that overlap
that make the difference.  Beyond :data:`THREADS`, for sources that answer within a millisecond, it
is the interpreter's lock that sets the pace, and more gain nothing (``docs/restore.md``).

Where the order goes straight, neighbours become one read.  Two vCPUs that go straight each on his
own, side by side, are told apart first: of a stretch of :data:`STRETCH` pages, neighbours are put
together wherever they stand in it.

**What fails is left to demand.**  A source that does not answer is waited for with the patience
that it was opened with, here as everywhere.  A read that fails after that ends nothing: the page is
absent as before, whoever needs it asks for it, and gets the page or the error.  After
:data:`GIVES_UP_AFTER` failures in a row all is left to demand.

How many pages came in so, and how many of them were of use, is what the pager counts
(:mod:`~guestfault.paging.ahead`).
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice, pairwise
from typing import Final

from guestfault.memory.ram import PAGE_SIZE
from guestfault.paging.ahead import Ahead
from guestfault.paging.pager import Pager
from guestfault.paging.source.base import SourceInterruptedError, interrupt, resume
from guestfault.paging.working_set import runs_of

__all__ = ["AS_FAST_AS_IT_GOES", "READ", "STRETCH", "THREADS", "Plan"]
__all__ += ["PrefetchAccount", "Prefetcher", "reads"]

READ: Final = 32
"""Pages that are read at once, at most."""
STRETCH: Final = 256
"""Pages of the order among which neighbours are looked for."""
THREADS: Final = 8
GIVES_UP_AFTER: Final = 8
AS_FAST_AS_IT_GOES: Final = math.inf

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 2.0
_GRACE = 0.05  # seconds that a read under way has to end by itself


@dataclass(frozen=True, slots=True)
class Plan:
    """What to bring in ahead: ``runs`` of page numbers, in order; then everything, if ``push``.

    ``push`` is in bytes a second.
    """

    runs: Sequence[range] = ()
    threads: int = THREADS
    push: float | None = None


@dataclass(slots=True)
class PrefetchAccount:
    """How the plan went.

    ``planned``: pages in the order.  ``failed``: reads that failed; ``gave_up``: no more are tried.
    """

    planned: int
    failed: int = 0
    gave_up: bool = False


def reads(runs: Iterable[range]) -> Iterator[range]:
    """The reads that bring all the pages in: each of neighbours, each no longer than ``READ``.

    In the order of the earliest page of each.
    """
    pages = chain.from_iterable(runs)
    while stretch := list(islice(pages, STRETCH)):
        if all(after == before + 1 for before, after in pairwise(stretch)):
            found = [range(stretch[0], stretch[-1] + 1)]
        else:
            place = {page: n for n, page in enumerate(stretch)}
            found = list(runs_of(sorted(stretch)))
            found.sort(key=lambda run: min(place[page] for page in run))
        for run in found:
            yield from (run[at : at + READ] for at in range(0, len(run), READ))


class Prefetcher:
    """Carries out a plan from :meth:`start` to :meth:`stop`, on threads of its own.

    May be started again, and then goes through what is left.
    """

    def __init__(self, pager: Pager, plan: Plan) -> None:
        self._pager = pager
        self._plan = plan
        self.account = PrefetchAccount(planned=sum(map(len, plan.runs)))
        self._lock = threading.Lock()  # of the next read, of who is still busy, and of the account
        self._stopping = threading.Event()
        self._threads: list[threading.Thread] = []
        self._reads: Iterator[range] = iter(())
        self._busy = 0
        self._in_a_row = 0

    def start(self) -> None:
        """Begin, or go on."""
        self._stopping.clear()
        self._in_a_row = 0
        self.account.gave_up = False
        self._reads = reads(self._plan.runs)
        self._busy = self._plan.threads if self._plan.runs else int(self._plan.push is not None)
        self._threads = [
            threading.Thread(target=self._work, name=f"prefetch{n}", daemon=True)
            for n in range(self._busy)
        ]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Bring in no more; the threads have ended when this returns.

        A read that does not end by itself is interrupted, so nobody else may be reading then.
        """
        self._stopping.set()
        deadline = time.monotonic() + _GRACE
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        if any(thread.is_alive() for thread in self._threads):
            interrupt(self._pager.source)
            for thread in self._threads:
                thread.join()
            resume(self._pager.source)
        self._threads = []

    def _work(self) -> None:
        while (read := self._next()) is not None:
            self._bring_in(read, Ahead.PREFETCH)
        with self._lock:
            self._busy -= 1
            last = not self._busy
        if last and self._plan.push is not None:
            self._push(self._plan.push)

    def _next(self) -> range | None:
        with self._lock:
            return None if self._stopping.is_set() else next(self._reads, None)

    def _push(self, rate: float) -> None:
        pager, pages = self._pager, self._pager.ram.pages
        due = time.monotonic()
        for first in range(0, pages, READ):
            if self._stopping.is_set():
                return
            asked, began = pager.pages_in - pager.ahead, time.monotonic()
            filled = self._bring_in(range(first, min(first + READ, pages)), Ahead.PUSH)
            now = time.monotonic()
            due = max(due, began) + filled * PAGE_SIZE / rate
            rest = now - began if pager.pages_in - pager.ahead > asked else 0.0
            if filled:
                self._stopping.wait(max(due - now, rest))

    def _bring_in(self, read: range, why: Ahead) -> int:
        """Bring in what is absent of them; how many pages that was."""
        try:
            filled = self._pager.bring_in_ahead(read.start, len(read), why)
        except SourceInterruptedError:
            self._stopping.set()
            return 0
        except Exception:
            # Whatever it is, it is for those to know who need the page, and they will meet it.
            self._failed()
            return 0
        if filled:
            self._in_a_row = 0
        return filled

    def _failed(self) -> None:
        with self._lock:
            self.account.failed += 1
            self._in_a_row += 1
            if self._in_a_row >= GIVES_UP_AFTER:
                self.account.gave_up = True
                self._stopping.set()
        self._stopping.wait(min(_LONGEST_PAUSE, _FIRST_PAUSE * 2**self._in_a_row))
