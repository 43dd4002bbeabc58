"""Runs one schedule: threads that are coroutines, and at each point the decision who goes on.

An actor is a greenlet.  At a preemption point it is *about to* take a step, and stands there until
the scheduler has it take it; the step lasts up to its next point, its next wait, or its end.  A
schedule is the sequence of these decisions.  Most of them follow from a policy (whoever runs goes
on for as long as it can; after it comes the next in turn that can), so a schedule is written down
as its *deviations*: pairs of a step's number and the actor, or the value chosen, there.  Step
numbers count decisions from 0; actors are numbered as the world lists them, workers in the order in
which they are spawned.

What a world and the code in it may say to the scheduler that runs them:

- ``preempt.preemption_point`` and ``preempt.wait``, under :func:`preempt.scheduled_by`.  ``until``
  of a wait is evaluated in its own actor's context (context variables, but not its stack) before
  each decision, thus many times, while other actors stand at their points; it may change
  something only if that does no harm when repeated.  A wait counts as a write of what it names;
- :func:`choose`: what may turn out in several ways;
- :func:`spawn`: a worker;
- :func:`annotate`: a note for the trace, at the current step;
- :func:`current_actor`: who runs.

With each schedule goes a *history hash*.  Each actor has a running hash of its steps and of the
versions of the shared things that they met, where the version of a thing is the hash of the step
that wrote it last and of those that have read it since.  The state's hash is made of all actors'.
Two schedules that only exchange steps which have nothing in common (or only read it) come to the
same hash, and, since everything shared stands behind a point, to the same state.

Python's hash of a tuple is quick, but differences in its last members pass through it almost
unchanged, and would cancel in a sum: so sums are made of the hashes' squares.

When nobody can go on and not all have ended, that is a deadlock; for threads that go on and get
nowhere see :mod:`guestfault.explore.endless`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Protocol

from greenlet import getcurrent, greenlet

from guestfault.explore.endless import Watch, deadlock
from guestfault.explore.scenario import World
from guestfault.explore.schedule import (
    DEFAULT_LIMITS,
    Actor,
    Deviation,
    End,
    Impossible,
    Limits,
    Run,
    Step,
    next_in_turn,
)
from guestfault.softkvm.preempt import scheduled_by

__all__ = ["Explorer", "Scheduler", "annotate", "choose", "current_actor", "recording", "spawn"]


class Explorer(Protocol):
    """Who is told of each decision beyond a schedule's last deviation, and may end the run."""

    def at_point(self, scheduler: Scheduler, actor: Actor) -> bool:
        """The actor will go on; all who live could as well.  Whether to cut here."""

    def at_switch(
        self,
        scheduler: Scheduler,
        last: Actor | None,
        free: bool,
        others: Sequence[Actor],
        enabled: Sequence[Actor],
    ) -> bool:
        """``others`` are the alternatives, of those ``enabled``; whether to cut here.

        Unless ``free``, ``last`` could go on, and will.  If ``free``, the first of ``others`` in
        turn will; ``scheduler.forced`` then says that ``last`` could, but is not let.
        """

    def at_choice(self, scheduler: Scheduler, actor: Actor, count: int) -> bool:
        """The actor chooses among ``count``, and will choose 0; whether to cut here."""


class _Abandoned(BaseException):
    """Unwinds an actor whose schedule is given up."""


class _Carrier(greenlet):
    """A greenlet that carries one actor after the other, for making one costs ten switches."""

    def __init__(self, scheduler: Scheduler, hub: greenlet) -> None:
        super().__init__(parent=hub)
        self.scheduler = scheduler
        self.actor: Actor | None = None

    def run(self) -> None:
        scheduler = self.scheduler
        while True:
            actor = self.actor
            assert actor is not None
            try:
                actor.function()
            except _Abandoned:
                pass
            except Exception as error:
                scheduler.failure = error
            except BaseException:  # Ctrl-C: ends this greenlet, and is raised in the hub
                scheduler.gone(actor)
                raise
            scheduler.gone(actor)
            scheduler.rest(self)


class Scheduler:
    """Runs schedules, one at a time.  See the module's text for what it decides and how."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        self._limits = limits
        self._watch_after = limits.watch_after
        self._hub = getcurrent()
        self._idle: list[_Carrier] = []
        self.failure: Exception | None = None
        self.record: list[Step] | None = None
        self._reset(())

    def _reset(self, deviations: Sequence[Deviation]) -> None:
        self._actors: list[Actor] = []
        self.live: list[Actor] = []  # by index
        self._waiting = 0
        self._current: Actor | None = None
        self._cells: dict[Hashable, list[int]] = {}
        self.state = 0
        self.step = 0
        self._preemptions = 0
        self._explorer: Explorer | None = None
        self._end: End | None = None
        self._stuck: str | None = None
        self._unwinding = False
        self._watch: Watch | None = None
        self.forced = False
        self.fairness = 0
        self._deviations = iter(deviations)
        self._last_deviation = deviations[-1][0] if deviations else -1
        self._next_deviation()

    def _next_deviation(self) -> None:
        self._deviation_at, self._deviation = next(self._deviations, (-1, 0))
        # Until then, and while nobody waits, whoever comes to a point goes on.
        calm = self._watch_after if self._deviation_at < 0 else self._deviation_at
        self._calm_until = min(calm, self._watch_after) if self.record is None else 0

    # -- what the hub does -------------------------------------------------------------------------

    def run(
        self,
        world: World,
        deviations: Sequence[Deviation] = (),
        explorer: Explorer | None = None,
        record: list[Step] | None = None,
    ) -> Run:
        """Run the world's actors; the world has not been told of the end when it returns.

        Raises :class:`Impossible` if the deviations do not fit, and what an actor raised.  In any
        case, call :meth:`abandon` after it, when the world has been asked what it came to.
        """
        global _running
        self.record = record
        self._reset(deviations)
        self._explorer = explorer
        self._world = world
        for name, function in world.actors.items():
            self._add(name, function, hash(("actor", name)))
        self._hub = getcurrent()
        _running = self
        try:
            with scheduled_by(self):
                last: Actor | None = None
                while self._end is None and self.live:
                    chosen = self._pick(last, False)
                    if chosen is not None:
                        self._current = chosen
                        self._switch_to(chosen)
                        last = self._current
                    if self.failure is not None:
                        failure, self.failure = self.failure, None
                        raise failure
        finally:
            _running = None
            self._current = None
        if self._deviation_at >= 0 and self._end is not End.CUT:
            raise Impossible(f"it ended before step {self._deviation_at}")
        return Run(self._end or End.COMPLETED, self.step, self._preemptions, self._stuck)

    def abandon(self) -> None:
        """Unwind the actors that have not ended."""
        self._unwinding = True
        self._current = None
        self._hub = getcurrent()
        if self.live:
            with scheduled_by(self):
                while self.live:
                    actor = self.live[-1]
                    if actor.carrier is None:
                        self.live.pop()
                    else:
                        actor.carrier.throw(_Abandoned)
        self.failure = None
        self._actors.clear()

    def gone(self, actor: Actor) -> None:
        """The actor has ended."""
        self.live.remove(actor)
        if actor.until is not None:
            self._waiting -= 1
        actor.carrier = None

    def rest(self, carrier: _Carrier) -> None:
        """Called by a carrier without an actor; returns when it has another."""
        carrier.actor = None
        self._idle.append(carrier)
        self._hub.switch()

    def _switch_to(self, actor: Actor) -> None:
        carrier = actor.carrier
        if carrier is None:
            carrier = self._idle.pop() if self._idle else _Carrier(self, self._hub)
            carrier.actor = actor
            actor.carrier = carrier
            carrier.gr_context = actor.context
        carrier.switch()

    def _add(self, name: str, function: Callable[[], None], uid: int) -> None:
        actor = Actor(len(self._actors), name, function, uid)
        self._actors.append(actor)
        self.live.append(actor)
        self.state += uid * uid

    # -- what actors say ---------------------------------------------------------------------------

    def point(self, name: str, shared: Hashable, write: bool = False) -> None:
        """See :class:`guestfault.softkvm.preempt.Scheduler`."""
        me = self._current
        if me is None:
            return  # unwinding
        step = self.step
        if step < self._calm_until and not self._waiting:
            if (
                step > self._last_deviation
                and self._explorer is not None
                and self._explorer.at_point(self, me)
            ):
                self._end = End.CUT
                self._go(None)
            self.step = step + 1
            before = me.hash
            if shared is None:
                me.hash = after = hash((before, name))
                self.state += after * after - before * before
                return
            cell = self._cells.get(shared)
            if cell is None:
                cell = self._cells[shared] = [hash(shared), 0]
            if write:
                me.hash = after = hash((before, name, cell[0], cell[1]))
                cell[0], cell[1] = after, 0
            else:
                me.hash = after = hash((before, name, cell[0]))
                cell[1] += after * after
            self.state += after * after - before * before
            return
        me.point, me.shared, me.write = name, shared, write
        chosen = self._pick(me, True)
        if chosen is not me:
            self._go(chosen)

    def wait(self, name: str, shared: Hashable, until: Callable[[], bool]) -> None:
        """See :class:`guestfault.softkvm.preempt.Scheduler`."""
        me = self._current
        if me is None:
            if self._unwinding:
                raise _Abandoned
            return
        me.point, me.shared, me.write, me.until = name, shared, True, until
        self._waiting += 1
        chosen = self._pick(me, until())
        if chosen is not me:
            self._go(chosen)

    def choose(self, name: str, count: int) -> int:
        """One of 0 ... ``count`` - 1: the search tries them all."""
        me = self._current
        if me is None:
            return 0
        step, value = self.step, 0
        if step == self._deviation_at:
            value = self._deviation
            if not 0 <= value < count:
                self._refuse(f"step {step} chooses among {count}, {value} is none of them")
            self._next_deviation()
        elif (
            self._explorer is not None
            and step > self._last_deviation
            and self._explorer.at_choice(self, me, count)
        ):
            self._end = End.CUT
            self._go(None)
        if step >= self._limits.steps:
            self._stop(f"no end in {step} steps; the last: {me.name} chooses {name!r}")
            self._go(None)
        self.step = step + 1
        before = me.hash
        me.hash = after = self.after_choice(me, value, count)
        self.state += after * after - before * before
        if self.record is not None:
            self.record.append(Step(me.index, f"{name}: {value}", None, False, [], True))
        return value

    def spawn(self, name: str, function: Callable[[], None]) -> None:
        """Another actor, from now on."""
        me = self._current
        if me is None:
            return
        before = me.hash
        me.hash = after = hash((before, "spawns"))
        self.state += after * after - before * before
        self._add(name, function, hash((after, name)))

    @property
    def current(self) -> str | None:
        """The name of the actor that runs."""
        return None if self._current is None else self._current.name

    def names(self) -> list[str]:
        """The actors' names by index, until the run is abandoned."""
        return [actor.name for actor in self._actors]

    # -- the decision ------------------------------------------------------------------------------

    def _go(self, chosen: Actor | None) -> None:
        """Let ``chosen`` run, or none; returns when the caller is to run again."""
        if chosen is None:
            self._hub.switch()
        else:
            self._current = chosen
            self._switch_to(chosen)

    def _stop(self, why: str) -> None:
        self._end, self._stuck = End.STUCK, why

    def _pick(self, last: Actor | None, can: bool) -> Actor | None:
        """Decide who takes the next step, and account for it; ``None`` ends the run."""
        step = self.step
        if self._waiting:
            others = [
                actor
                for actor in self.live
                if actor is not last and (actor.until is None or actor.context.run(actor.until))
            ]
        else:
            others = [actor for actor in self.live if actor is not last]
        if not can and not others:
            self._stop(deadlock(self.live))
            return None
        if step >= self._watch_after:
            self._watch = self._watch or Watch(self._limits, self._world)
            left_out = self._watch.left_out(step, last, others, self.live)
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
            if can:
                assert last is not None
                chosen = last
            else:
                chosen = next_in_turn(last, others)
            if (
                self._explorer is not None
                and step > self._last_deviation
                and self._explorer.at_switch(self, last, not can, others, enabled)
            ):
                self._end = End.CUT
                return None
        if chosen is not last:
            self.fairness = self.fairness_after(chosen, () if can else enabled)
            if can:
                self._preemptions += 1
            else:
                for actor in enabled:
                    actor.passed += 1
            chosen.passed = 0
        self.step = step + 1
        if self.record is not None:
            self.record.append(Step(chosen.index, chosen.point, chosen.shared, chosen.write, []))
        if chosen.until is not None:
            chosen.until = None
            self._waiting -= 1
        chosen.ran = step
        if self._watch is not None:
            self._watch.took(chosen)
        before, shared = chosen.hash, chosen.shared
        if shared is None:
            after = hash((before, chosen.point))
        else:
            cell = self._cells.get(shared)
            if cell is None:
                cell = self._cells[shared] = [hash(shared), 0]
            if chosen.write:
                after = hash((before, chosen.point, cell[0], cell[1]))
                cell[0], cell[1] = after, 0
            else:
                after = hash((before, chosen.point, cell[0]))
                cell[1] += after * after
        chosen.hash = after
        self.state += after * after - before * before
        return chosen

    def fairness_after(self, chosen: Actor, enabled: Sequence[Actor]) -> int:
        """A hash of how often each was passed over, when ``chosen`` will have been let go on.

        ``enabled`` are those who could have gone on instead, where that counts as passed over.
        """
        total = 0
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

    def _refuse(self, why: str) -> None:
        """End the run with :class:`Impossible`; from an actor, whose code must not see it."""
        self.failure, self._end = Impossible(why), End.CUT
        self._go(None)


_running: Scheduler | None = None


def choose(name: str, count: int) -> int:
    """One of 0 ... ``count`` - 1, which the search tries all; 0 outside a run.

    For what may turn out in several ways: "this access fails", with 0 for the ordinary one.  It
    is not a point: nobody comes in between.
    """
    return 0 if _running is None else _running.choose(name, count)


def spawn(name: str, function: Callable[[], None]) -> None:
    """Start a worker: an actor of its own from now on.  Nothing outside a run."""
    if _running is not None:
        _running.spawn(name, function)


def annotate(text: str) -> None:
    """Note in the trace what the current step does.  Costs nothing when nobody records.

    Give a plain text; for one that must be put together, ask :func:`recording` first.
    """
    if _running is not None and _running.record:
        _running.record[-1].notes.append(text)


def recording() -> bool:
    """Whether notes are kept."""
    return _running is not None and _running.record is not None


def current_actor() -> str | None:
    """The name of the actor that runs; ``None`` outside a run."""
    return None if _running is None else _running.current
