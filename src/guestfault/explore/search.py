"""Enumerates schedules: by re-execution, fewest preemptions first, each state once.

Depth first from the schedule without deviations: at each new decision of a run, every other actor
that could go on is another schedule, to be run later from its beginning.  To switch away from an
actor that could go on is a *preemption*, to switch where it waits or has ended is not.  Schedules
are tried in levels: all those without a preemption, then all those with one, up to the bound.
Experience has it that most races show with two (Musuvathi and Qadeer, "Iterative context bounding
for systematic testing of multithreaded programs", PLDI 2007), and the first counterexample found
has the fewest possible.

Nobody who could go on is passed over more than :attr:`~guestfault.explore.schedule.Limits.passes`
times where others wait or end, or a schedule without preemptions could still put him off for ever.

What makes it affordable is that most schedules come to where another has been.  The scheduler's
history hash says so; together with who ran last (who runs on costs no preemption) and how often
each was passed over it is the key of a decision, and a decision whose key is known is not explored
again: whoever came there first came with no more preemptions, because of the levels, and had all
that follows before it.  Even the run that would lead there is saved, if one step leads there: the
hash after a step can be told before.

A search is done in *rounds* of *parts*.  A part is a list of schedules to begin with; it sees what
was known when the round began, and what it finds is merged when the round ends.  How a round is cut
into parts depends on nothing but the scenario, so the result is the same whoever does the parts:
see :mod:`guestfault.explore.jobs`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from guestfault.dialect.record import Dialect
from guestfault.explore.part import Bound, Item, Part, PartResult
from guestfault.explore.rewind import Worlds
from guestfault.explore.scenario import Scenario
from guestfault.explore.tally import Tally
from guestfault.explore.walk import explore_part

__all__ = ["Bound", "Search", "explore"]

PART_SIZE = 1000
"""Schedules that a part begins with; a level with no more than this is not cut."""


class Search:
    """One scenario under one dialect, as rounds of parts.

    Without ``hashing`` every schedule is run: to be sure that nothing is lost by it.
    """

    def __init__(
        self, scenario: Scenario, dialect: Dialect, bound: Bound, *, hashing: bool = True
    ) -> None:
        self.hashing = hashing
        self.scenario = scenario
        self.dialect = dialect
        self.bound = bound
        self.tally = Tally()
        self.states: set[int] = set()
        """The keys of the decisions explored so far; forgotten in the end."""
        self.explored = 0
        """How many there are."""
        self.exhausted = -1
        """All schedules with up to so many preemptions were explored."""
        self.beyond = False
        """Whether there are other schedules: with more preemptions, or that pass somebody over."""
        self.stopped: str | None = None
        """What ended the search before it was through."""
        self.deadline: float | None = None
        self._worlds = Worlds(scenario, dialect)
        self._level = 0
        self._items: list[Item] = [(0, None)]
        self._next: list[Item] = []

    @property
    def done(self) -> bool:
        """Whether nothing is left to do."""
        return self.stopped is not None or not self._items

    def round(self) -> list[Part]:
        """The next parts, which can be done in any order; none when the search is done."""
        if self.done:
            return []
        if self.deadline is None and self.bound.seconds is not None:
            self.deadline = time.monotonic() + self.bound.seconds
        items = self._items
        pieces = [items[i : i + PART_SIZE] for i in range(0, len(items), PART_SIZE)]
        left = None
        if self.bound.schedules is not None:
            left = -(-max(1, self.bound.schedules - self.tally.schedules) // len(pieces))
        deep = PART_SIZE if len(pieces) == 1 else 0
        return [Part(self._level, piece, deep, left) for piece in pieces]

    def do(self, part: Part) -> PartResult:
        """Do one of them, here and now."""
        return explore_part(
            self._worlds,
            self.bound,
            part,
            known=self.states,
            hashing=self.hashing,
            deadline=self.deadline,
        )

    def merge(self, results: Sequence[PartResult]) -> None:
        """Take in what the parts of a round have found, in the round's order."""
        bound, self._level = self.bound, results[0].level
        left: list[Item] = []
        for result in results:
            self.states |= result.states
            self.tally.add(result.tally)
            self.beyond |= result.beyond
            left += result.left
            self._next += result.items
            if result.out_of_time:
                self.stopped = f"limit of {bound.seconds:g} seconds"
        self._items = self._unique(left)
        if not self._items and self.stopped is None:
            self._level += 1
            self._items, self._next = self._unique(self._next), []
        through = not self._items and self.stopped is None
        self.exhausted = bound.preemptions if through else self._level - 1
        self.explored = len(self.states)
        limit = bound.schedules
        if self._items and limit is not None and self.tally.schedules >= limit:
            self.stopped = self.stopped or f"limit of {limit} schedules"
        if self.done:
            self.states, self._items, self._next = set(), [], []
            self._worlds.close()

    def _unique(self, items: list[Item]) -> list[Item]:
        """Those that no part has explored, each once: several may have been about to."""
        if not self.hashing:
            return items
        known, unique = set(self.states), []
        for item in items:
            if item[0] in known:
                self.tally.skipped += 1
            else:
                known.add(item[0])
                unique.append(item)
        return unique


def explore(
    scenario: Scenario,
    dialect: Dialect,
    bound: Bound,
    progress: Callable[[Search], None] | None = None,
    *,
    hashing: bool = True,
) -> Search:
    """Search in this process; returns when it is done.

    Raises :class:`~guestfault.explore.schedule.WorldDefect`.
    """
    search = Search(scenario, dialect, bound, hashing=hashing)
    while parts := search.round():
        search.merge([search.do(part) for part in parts])
        if progress is not None:
            progress(search)
    return search
