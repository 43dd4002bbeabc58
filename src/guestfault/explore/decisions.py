"""Who takes the next step: the policy, what deviates from it, and what is remembered of it.

At a point whoever comes to it goes on, unless the schedule has another go on there; when he waits
or has ended it is the turn of the next that can.  Nobody who could go on is passed over for ever,
and schedules that do not end are ended: see :mod:`guestfault.explore.endless`.  An *explorer* is
told of each decision for which the schedule has nothing more to say.

With each schedule goes a *history hash*.  Each actor has a running hash of its steps and of the
versions of the shared things that they met, where the version of a thing is the hash of the step
that wrote it last and of those that have read it since.  The state's hash is made of all actors'.
Two schedules that only exchange steps which have nothing in common (or only read it) come to the
same hash, and, since everything shared stands behind a point, to the same state.

Python's hash of a tuple is quick, but differences in its last members pass through it almost
unchanged, and would cancel in a sum: so sums are made of the hashes' squares.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from guestfault.explore.endless import Watch, deadlock, watch_from
from guestfault.explore.scenario import World
from guestfault.explore.schedule import (
    Actor,
    Deviation,
    End,
    Impossible,
    Limits,
    Step,
    next_in_turn,
)

__all__ = ["Decisions", "Explorer"]


class Explorer(Protocol):
    """Who is told of each decision beyond a schedule's last deviation, and may end the run."""

    def at_point(self, decisions: Decisions, actor: Actor) -> bool:
        """The actor will go on; :meth:`Decisions.others` could.  Whether to cut here."""

    def at_switch(
        self,
        decisions: Decisions,
        last: Actor | None,
        others: Sequence[Actor],
        enabled: Sequence[Actor],
    ) -> bool:
        """``last`` will not go on, but the first of ``others`` in turn; whether to cut here.

        ``others`` are those of ``enabled`` who are not to be passed over.  ``decisions.forced``
        says that ``last`` could go on, but is not let.
        """

    def at_choice(self, decisions: Decisions, actor: Actor, count: int) -> bool:
        """The actor chooses among ``count``, and will choose 0; whether to cut here."""


class Decisions:
    """The decisions of one schedule after the other."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self.failure: Exception | None = None
        self._begin(None)

    def _begin(
        self,
        world: World | None,
        deviations: Sequence[Deviation] = (),
        explorer: Explorer | None = None,
        record: list[Step] | None = None,
    ) -> None:
        self.record = record
        self._world = world
        self._threads = 0 if world is None else len(world.actors)
        self.actors: list[Actor] = []
        self.live: list[Actor] = []  # by index
        self.waiting = 0  # how many wait
        self._watched: dict[Hashable, int] = {}  # what an ``until`` that acts depends on
        self._stale = False  # whether such a thing was written since they were asked
        self._cells: dict[Hashable, list[int]] = {}
        self._moves: Actor | None = None  # who has taken the last step
        self.standing = 0  # the squares of the others' hashes
        self.step = 0
        self._preemptions = 0
        self._explorer = explorer
        self._at_point = _go_on if explorer is None else explorer.at_point
        self._end: End | None = None
        self._stuck: str | None = None
        self._watch: Watch | None = None
        self._watch_from = 0 if world is None else watch_from(self._limits, world)
        self._turn = 0  # the step with which whoever runs has begun to go on
        self.forced = False
        self.fairness = 0
        self._deviations = iter(deviations)
        self._last_deviation = deviations[-1][0] if deviations else -1
        self._next_deviation()

    def _next_deviation(self) -> None:
        self._deviation_at, self._deviation = next(self._deviations, (-1, 0))
        self._expect_calm()

    def _expect_calm(self) -> None:
        """Tell until when whoever comes to a point goes on, unless the explorer cuts there."""
        if self._stale or self.record is not None:
            self._calm_until = 0
        elif 0 <= self._deviation_at < self._watch_from:
            self._calm_until = self._deviation_at
        else:
            self._calm_until = self._watch_from

    def _add(self, name: str, function: Callable[[], None], uid: int) -> None:
        actor = Actor(len(self.actors), name, function, uid)
        self.actors.append(actor)
        self.live.append(actor)
        self.standing += uid * uid

    @property
    def state(self) -> int:
        """The state's hash: the squares of the actors'."""
        actor = self._moves
        return self.standing if actor is None else self.standing + actor.hash * actor.hash

    def _waits_no_more(self, actor: Actor) -> None:
        if actor.until is not None:
            actor.until = None
            self.waiting -= 1
            if actor.acts:
                self._watched[actor.shared] -= 1
                if not self._watched[actor.shared]:
                    del self._watched[actor.shared]

    def _waits(self, actor: Actor, until: Callable[[], bool], acts: bool, can: bool) -> None:
        """The actor stands at a wait, and ``can`` is what ``until`` has said just now."""
        actor.until, actor.acts, actor.can = until, acts, can
        self.waiting += 1
        if acts:
            self._watched[actor.shared] = self._watched.get(actor.shared, 0) + 1

    def _written(self) -> None:
        """What an ``until`` that acts depends on is written: it is asked at the next decision."""
        self._stale = True
        self._calm_until = 0

    def _ask(self, last: Actor | None) -> None:
        """Ask each ``until`` that acts, but that of ``last``, who has just asked himself.

        Whether or not the decision depends on what they say.  To ask them at each decision would
        come to the same: what they do once they do no more before something is written.
        """
        self._stale = False
        for actor in self.live:
            if actor.until is not None and actor.acts and actor is not last:
                actor.can = actor.context.run(actor.until)
        self._expect_calm()

    def _stop(self, why: str) -> None:
        self._end, self._stuck = End.STUCK, why

    def _pick(self, last: Actor | None, can: bool) -> Actor | None:
        """Decide who takes the next step, and account for it; ``None`` ends the run."""
        if self._stale:
            self._ask(last)
        step, others = self.step, self.others(last)
        if not can and not others:
            self._stop(deadlock(self.live))
            return None
        if step >= self._watch_from:
            if self._watch is None:
                assert self._world is not None
                self._watch = Watch(self._limits, self._world)
            left_out = self._watch.left_out(step, self._turn, last, others, self.live)
            if isinstance(left_out, str):
                self._stop(left_out)
                return None
            self.forced = bool(left_out)
            if left_out:
                can, others = False, left_out
        enabled = others
        if not can:
            overdue = [actor for actor in others if actor.passed >= self._limits.passes]
            if overdue:
                others = overdue
        if step == self._deviation_at:
            deviate = self._deviate(last if can else None, others)
            if deviate is None:
                return None
            chosen = deviate
        else:
            chosen = last if can and last is not None else next_in_turn(last, others)
            explorer = self._explorer
            if (
                explorer is not None
                and step > self._last_deviation
                and (
                    explorer.at_point(self, chosen)
                    if can
                    else explorer.at_switch(self, last, others, enabled)
                )
            ):
                self._end = End.CUT
                return None
        if chosen is not last:
            self._switches(last, chosen, can, enabled)
        self.step = step + 1
        if self.record is not None:
            self.record.append(Step(chosen.index, chosen.point, chosen.shared, chosen.write, []))
        self._waits_no_more(chosen)
        chosen.ran = step
        if self._watch is not None:
            self._watch.took(chosen)
        shared = chosen.shared
        chosen.hash = after = self.after_step(chosen)
        if shared is not None:
            if chosen.write:
                self._cells[shared] = [after, 0]
                if shared in self._watched:
                    self._written()
            else:
                self._cells.setdefault(shared, [hash(shared), 0])[1] += after * after
        return chosen

    def others(self, last: Actor | None) -> list[Actor]:
        """Who but ``last`` can take a step."""
        if not self.waiting:
            return [actor for actor in self.live if actor is not last]
        return [
            actor
            for actor in self.live
            if actor is not last
            and (
                actor.until is None or (actor.can if actor.acts else actor.context.run(actor.until))
            )
        ]

    def _switches(
        self, last: Actor | None, chosen: Actor, can: bool, enabled: Sequence[Actor]
    ) -> None:
        """Account for it that another goes on than ``last``."""
        self.standing = self.state - chosen.hash * chosen.hash
        self._moves = chosen
        self.fairness = self.fairness_after(chosen, () if can else enabled)
        if can:
            self._preemptions += 1
        else:
            for actor in enabled:
                actor.passed += 1
        chosen.passed = 0
        # One worker is like another, when it is about who takes his turn for how long.
        if last is None or min(last.index, chosen.index) < self._threads:
            self._turn = self.step

    def fairness_after(self, chosen: Actor, enabled: Sequence[Actor]) -> int:
        """A hash of how often each was passed over, when ``chosen`` will have been let go on.

        ``enabled`` are those who could have gone on instead, where that counts as passed over.
        """
        total = 0
        if not enabled and not self.fairness:
            return total
        for actor in self.live:
            passed = 0 if actor is chosen else actor.passed + (actor in enabled)
            if passed:
                one = hash((actor.uid, passed))
                total += one * one
        return total

    def after_step(self, actor: Actor) -> int:
        """The actor's hash when it will have taken the step that it is about to take."""
        shared = actor.shared
        if shared is None:
            return hash((actor.hash, actor.point))
        cell = self._cells.get(shared)
        version, reads = (hash(shared), 0) if cell is None else cell
        if actor.write:
            return hash((actor.hash, actor.point, version, reads))
        return hash((actor.hash, actor.point, version))

    def after_choice(self, actor: Actor, value: int, count: int) -> int:
        """The actor's hash when it will have chosen ``value``."""
        return hash((actor.hash, value, count))

    def _deviate(self, last: Actor | None, others: list[Actor]) -> Actor | None:
        index = self._deviation
        self._next_deviation()
        for actor in others if last is None else (last, *others):
            if actor.index == index:
                return actor
        self.failure = Impossible(f"actor {index} cannot go on at step {self.step}")
        self._end = End.CUT
        return None


def _go_on(_decisions: Decisions, _actor: Actor) -> bool:
    """What an explorer says who is not there."""
    return False
