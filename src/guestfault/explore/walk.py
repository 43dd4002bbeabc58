"""Does one part of a search: runs its schedules, and those that branch off from them.

A walk is the scheduler's explorer.  Told of a decision, it cuts the run there if the decision's key
is known; else it puts the schedules in which another goes on there where they are to be run: those
with as many preemptions on its stack, those with one more into the next level.
"""

from __future__ import annotations

import gc
import time
import traceback
import warnings
from collections.abc import Sequence

from guestfault.explore.decisions import Decisions
from guestfault.explore.part import Bound, Item, Link, Part, PartResult
from guestfault.explore.rewind import Worlds
from guestfault.explore.schedule import (
    Actor,
    Deviation,
    End,
    Impossible,
    WorldDefect,
    next_in_turn,
)
from guestfault.explore.scheduler import Scheduler
from guestfault.explore.tally import Example, Tally

__all__ = ["explore_part"]


def explore_part(
    worlds: Worlds,
    bound: Bound,
    part: Part,
    *,
    known: set[int],
    hashing: bool,
    deadline: float | None,
) -> PartResult:
    """Do one part of a search that knows the decisions ``known``.

    Without ``hashing`` every schedule is run.  ``deadline`` is by the monotonic clock.
    """
    walk = _Walk(worlds, bound, part, known, hashing, deadline)
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

    def __init__(
        self,
        worlds: Worlds,
        bound: Bound,
        part: Part,
        known: set[int],
        hashing: bool,
        deadline: float | None,
    ) -> None:
        self._worlds = worlds
        self._bound = bound
        self._known = known
        self._hashing = hashing
        self._deadline = deadline
        self._most = part.schedules
        self._deep = part.deep
        self._level = part.level
        self._stack = part.items[::-1]
        self._next: list[Item] = []
        self._states: set[int] = set()
        self._tally = Tally()
        self._at_bound = part.level >= bound.preemptions
        self._beyond = False
        self._out_of_time = False
        self._link: Link | None = None

    def go(self) -> PartResult:
        """Run what there is to run."""
        scheduler = Scheduler(self._bound.limits)
        going = self._one_level(scheduler)
        while going and 0 < len(self._next) <= self._deep:
            self._level += 1
            self._at_bound = self._level >= self._bound.preemptions
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
        deadline, hashing = self._deadline, self._hashing
        while stack:
            key, link = stack[-1]
            if hashing and link is not None and (key in new or key in known):
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
        tally, worlds = self._tally, self._worlds
        try:
            world = worlds.fresh()
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
                worlds.done_with(world)
        except Exception as error:
            where = f"{worlds.scenario.name}, {worlds.dialect.name}, {deviations}"
            if isinstance(error, Impossible):
                where += " (it does not do the same each time)"
            raise WorldDefect(where, "".join(traceback.format_exception(error))) from error

    # -- what the scheduler tells ------------------------------------------------------------------

    def at_point(self, decisions: Decisions, actor: Actor) -> bool:
        """See :class:`guestfault.explore.decisions.Explorer`."""
        if self._hashing:
            one = actor.hash  # this is decisions.state, sooner
            key = hash((decisions.standing + one * one, actor.uid, decisions.fairness))
            new = self._states
            if key in new or key in self._known:
                return True
            new.add(key)
        if not self._at_bound:
            could = decisions.others(actor) if decisions.waiting else decisions.live
            self._branch(decisions, could, actor, (), self._next)
        elif not self._beyond:
            self._beyond = bool(decisions.others(actor))
        return False

    def at_switch(
        self,
        decisions: Decisions,
        last: Actor | None,
        others: Sequence[Actor],
        enabled: Sequence[Actor],
    ) -> bool:
        """See :class:`guestfault.explore.decisions.Explorer`."""
        state, fairness = decisions.state, decisions.fairness
        if decisions.forced:
            assert last is not None
            key = hash((state, last.uid, fairness, "forced"))
        else:
            key = hash((state, fairness))
        if self._hashing:
            if key in self._states or key in self._known:
                return True
            self._states.add(key)
            if not decisions.forced:
                # Whoever cannot go on here has this decision before him, too, if he came here last.
                # Who can has not: to go on by himself he need not pass the others over.
                for actor in decisions.actors:
                    if actor not in enabled:
                        self._states.add(hash((state, actor.uid, fairness)))
        if len(others) < len(enabled):
            self._beyond = True
        default = next_in_turn(last, others)
        self._branch(decisions, others, default, enabled, self._stack)
        return False

    def _branch(
        self,
        decisions: Decisions,
        actors: Sequence[Actor],
        default: Actor,
        passed: Sequence[Actor],
        items: list[Item],
    ) -> None:
        """Put the schedules where one of ``actors`` but the ``default`` goes on among ``items``.

        ``passed`` are those who are passed over if another goes on.
        """
        state, link, step = decisions.state, self._link, decisions.step
        new, known = self._states, self._known
        for actor in actors:
            if actor is default:
                continue
            after, before = decisions.after_step(actor), actor.hash
            then = state + after * after - before * before
            fairness = decisions.fairness_after(actor, passed)
            key = hash((then, actor.uid, fairness))
            if self._hashing and (key in new or key in known):
                self._tally.skipped += 1
            else:
                items.append((key, (link, step, actor.index)))

    def at_choice(self, decisions: Decisions, actor: Actor, count: int) -> bool:
        """See :class:`guestfault.explore.decisions.Explorer`."""
        state, link, step = decisions.state, self._link, decisions.step
        if self._hashing:
            key = hash((state, actor.uid, decisions.fairness))
            if key in self._states or key in self._known:
                return True
            self._states.add(key)
        for value in range(count - 1, 0, -1):
            after, before = decisions.after_choice(actor, value, count), actor.hash
            then = state + after * after - before * before
            key = hash((then, actor.uid, decisions.fairness))
            self._stack.append((key, (link, step, value)))
        return False


def _deviations(link: Link | None) -> tuple[Deviation, ...]:
    found: list[Deviation] = []
    while link is not None:
        link, step, value = link
        found.append((step, value))
    return tuple(reversed(found))
