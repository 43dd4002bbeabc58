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

import gc
import time
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Scenario
from guestfault.explore.schedule import (
    DEFAULT_LIMITS,
    Actor,
    Deviation,
    End,
    Impossible,
    Limits,
    WorldDefect,
    next_in_turn,
)
from guestfault.explore.scheduler import Scheduler
from guestfault.explore.tally import Example, Tally

__all__ = ["Bound", "Part", "PartResult", "Search", "explore", "explore_part"]

PART_SIZE = 1000
"""Schedules that a part begins with; a level with no more than this is not cut."""

_Link = tuple["_Link | None", int, int]
"""A schedule: the one it deviates from, where, and how."""
_Item = tuple[int, int, _Link | None]
"""A schedule to run, and the keys of the decision that its last deviation leads to."""


@dataclass(frozen=True, slots=True)
class Bound:
    """How far a search goes.

    ``preemptions`` bounds every schedule; ``schedules`` and ``seconds`` the whole.  Where time ends
    a search its result depends on the machine.
    """

    preemptions: int = 2
    schedules: int | None = None
    seconds: float | None = None
    limits: Limits = DEFAULT_LIMITS


@dataclass(slots=True)
class Part:
    """Schedules to begin with, all with ``level`` preemptions.

    If ``deep``, the part goes on with the next level as long as it is small.
    """

    level: int
    items: list[_Item]
    deep: bool
    schedules: int | None = None  # the most to run


@dataclass(slots=True)
class PartResult:
    """What a part found, having come as far as ``level``.

    ``left`` have ``level`` preemptions and were not run, for the part was to run no more;
    ``items`` have one more.
    """

    level: int
    left: list[_Item]
    items: list[_Item]
    states: set[int]
    tally: Tally
    beyond: bool
    out_of_time: bool


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
        self._level = 0
        self._items: list[_Item] = [(0, 0, None)]
        self._next: list[_Item] = []

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
        deep = len(pieces) == 1
        return [Part(self._level, piece, deep, left) for piece in pieces]

    def merge(self, results: Sequence[PartResult]) -> None:
        """Take in what the parts of a round have found, in the round's order."""
        bound, self._level = self.bound, results[0].level
        left: list[_Item] = []
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

    def _unique(self, items: list[_Item]) -> list[_Item]:
        """Those that no part has explored, each once: several may have been about to."""
        if not self.hashing:
            return items
        known, unique = set(self.states), []
        for item in items:
            if item[0] in known or item[1] in known:
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
        search.merge([explore_part(search, part) for part in parts])
        if progress is not None:
            progress(search)
    return search


def explore_part(search: Search, part: Part) -> PartResult:
    """Do one part of a search."""
    walk = _Walk(search, part)
    # What is known by now is not garbage, and a collection would look at it again and again.
    gc.freeze()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a kernel's WARN_ON_ONCE is the world's to judge
            return walk.go()
    finally:
        gc.unfreeze()


class _Walk:
    """Does one part; the scheduler's explorer."""

    def __init__(self, search: Search, part: Part) -> None:
        self._search = search
        self._known = search.states
        self._hashing = search.hashing
        self._most = part.schedules
        self._deep = part.deep
        self._level = part.level
        self._stack = part.items[::-1]
        self._next: list[_Item] = []
        self._states: set[int] = set()
        self._tally = Tally()
        self._at_bound = part.level >= search.bound.preemptions
        self._beyond = False
        self._out_of_time = False
        self._link: _Link | None = None

    def go(self) -> PartResult:
        """Run what there is to run."""
        scheduler = Scheduler(self._search.bound.limits)
        going = self._one_level(scheduler)
        while going and self._deep and 0 < len(self._next) <= PART_SIZE:
            self._level += 1
            self._at_bound = self._level >= self._search.bound.preemptions
            self._stack, self._next = self._next[::-1], []
            going = self._one_level(scheduler)
        return PartResult(
            self._level,
            self._stack[::-1],
            self._next,
            self._states,
            self._tally,
            self._beyond,
            self._out_of_time,
        )

    def _one_level(self, scheduler: Scheduler) -> bool:
        """Run this level's schedules; whether that was possible."""
        stack, new, known, tally = self._stack, self._states, self._known, self._tally
        deadline, hashing = self._search.deadline, self._hashing
        while stack:
            key, key_if_free, link = stack[-1]
            if (
                hashing
                and link is not None
                and (key in new or key in known or key_if_free in new or key_if_free in known)
            ):
                tally.skipped += 1
                stack.pop()
                continue
            if self._most is not None and tally.schedules >= self._most:
                return False
            if deadline is not None and time.monotonic() >= deadline:
                self._out_of_time = True
                return False
            stack.pop()
            self._link = link
            self._run(scheduler, _deviations(link))
        return True

    def _run(self, scheduler: Scheduler, deviations: tuple[Deviation, ...]) -> None:
        search, tally = self._search, self._tally
        try:
            world = search.scenario.build(search.dialect)
            try:
                run = scheduler.run(world, deviations, self)
                tally.steps += run.steps
                if run.end is End.CUT:
                    tally.cut += 1
                else:
                    tally.completed += 1
                    verdict = world.verdict(stuck=run.stuck)
                    tally.note(
                        verdict, Example(run.preemptions, run.steps, deviations, verdict.text)
                    )
            finally:
                scheduler.abandon()
                world.close()
        except Exception as error:
            where = f"{search.scenario.name}, {search.dialect.name}, {deviations}"
            if isinstance(error, Impossible):
                where += " (it does not do the same each time)"
            raise WorldDefect(where, "".join(traceback.format_exception(error))) from error

    # -- what the scheduler tells ------------------------------------------------------------------

    def at_point(self, scheduler: Scheduler, actor: Actor) -> bool:
        """See :class:`guestfault.explore.scheduler.Explorer`."""
        if self._hashing:
            key = hash((scheduler.state, actor.uid, scheduler.fairness))
            new = self._states
            if key in new or key in self._known:
                return True
            new.add(key)
        if len(scheduler.live) > 1:
            if self._at_bound:
                self._beyond = True
            else:
                others = [other for other in scheduler.live if other is not actor]
                self._branch(scheduler, others, (), self._next)
        return False

    def at_switch(
        self,
        scheduler: Scheduler,
        last: Actor | None,
        free: bool,
        others: Sequence[Actor],
        enabled: Sequence[Actor],
    ) -> bool:
        """See :class:`guestfault.explore.scheduler.Explorer`."""
        state, fairness = scheduler.state, scheduler.fairness
        if not free:
            assert last is not None
            key = hash((state, last.uid, fairness))
        elif scheduler.forced:
            assert last is not None
            key = hash((state, last.uid, fairness, "forced"))
        else:
            key = hash((state, fairness))
        if self._hashing:
            if key in self._states or key in self._known:
                return True
            self._states.add(key)
        if len(others) < len(enabled):
            self._beyond = True
        if free:
            default = next_in_turn(last, others)
            rest = [actor for actor in others if actor is not default]
            self._branch(scheduler, rest, enabled, self._stack)
        elif self._at_bound:
            self._beyond = self._beyond or bool(others)
        else:
            self._branch(scheduler, others, (), self._next)
        return False

    def _branch(
        self,
        scheduler: Scheduler,
        actors: Sequence[Actor],
        passed: Sequence[Actor],
        items: list[_Item],
    ) -> None:
        """Put the schedules where one of ``actors`` goes on here among ``items``.

        ``passed`` are those who are passed over if another goes on.
        """
        state, link, step = scheduler.state, self._link, scheduler.step
        new, known = self._states, self._known
        for actor in actors:
            after, before = scheduler.after_step(actor), actor.hash
            then = state + after * after - before * before
            fairness = scheduler.fairness_after(actor, passed)
            key, key_if_free = hash((then, actor.uid, fairness)), hash((then, fairness))
            if self._hashing and (
                key in new or key in known or key_if_free in new or key_if_free in known
            ):
                self._tally.skipped += 1
            else:
                items.append((key, key_if_free, (link, step, actor.index)))

    def at_choice(self, scheduler: Scheduler, actor: Actor, count: int) -> bool:
        """See :class:`guestfault.explore.scheduler.Explorer`."""
        state, link, step = scheduler.state, self._link, scheduler.step
        if self._hashing:
            key = hash((state, actor.uid, scheduler.fairness))
            if key in self._states or key in self._known:
                return True
            self._states.add(key)
        for value in range(count - 1, 0, -1):
            after, before = scheduler.after_choice(actor, value, count), actor.hash
            then = state + after * after - before * before
            key = hash((then, actor.uid, scheduler.fairness))
            key_if_free = hash((then, scheduler.fairness))
            self._stack.append((key, key_if_free, (link, step, value)))
        return False


def _deviations(link: _Link | None) -> tuple[Deviation, ...]:
    found: list[Deviation] = []
    while link is not None:
        link, step, value = link
        found.append((step, value))
    return tuple(reversed(found))
