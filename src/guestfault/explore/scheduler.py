"""Runs one schedule: threads that are coroutines, and at each point the decision who goes on.

An actor is a greenlet.  At a preemption point it is *about to* take a step, and stands there until
the scheduler has it take it; the step lasts up to its next point, its next wait, or its end.  A
schedule is the sequence of these decisions.  Most of them follow from a policy (whoever runs goes
on for as long as it can; after it comes the next in turn that can), so a schedule is written down
as its *deviations*: pairs of a step's number and the actor, or the value chosen, there.  Step
numbers count decisions from 0; actors are numbered as the world lists them, workers in the order in
which they are spawned.  How it is decided, and what is remembered of it, is :mod:`.decisions`.

What a world and the code in it may say to the scheduler that runs them:

- ``preempt.preemption_point`` and ``preempt.wait``, under :func:`preempt.scheduled_by`.  ``until``
  of a wait is evaluated in its own actor's context (context variables, but not its stack) when a
  decision depends on it, while other actors stand at their points; one that ``acts`` is evaluated
  before the decision that follows on a write of what it names.  A wait counts as a write itself;
- :func:`choose`: what may turn out in several ways;
- :func:`spawn`: a worker;
- :func:`annotate`: a note for the trace, at the current step;
- :func:`current_actor`: who runs.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence

from greenlet import getcurrent, greenlet

from guestfault.explore.decisions import Decisions, Explorer
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
)
from guestfault.softkvm.preempt import scheduled_by

__all__ = ["Explorer", "Scheduler", "annotate", "choose", "current_actor", "recording", "spawn"]


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


class Scheduler(Decisions):
    """Runs schedules, one at a time."""

    def __init__(self, limits: Limits = DEFAULT_LIMITS) -> None:
        super().__init__(limits)
        self._hub = getcurrent()
        self._idle: list[_Carrier] = []
        self._current: Actor | None = None
        self._unwinding = False

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
        self._begin(world, deviations, explorer, record)
        self._unwinding = False
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
        self.actors.clear()

    def gone(self, actor: Actor) -> None:
        """The actor has ended."""
        self.live.remove(actor)
        self._waits_no_more(actor)
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

    # -- what actors say ---------------------------------------------------------------------------

    def point(self, name: str, shared: Hashable, write: bool = False) -> None:
        """See :class:`guestfault.softkvm.preempt.Scheduler`."""
        me = self._current
        if me is None:
            return  # unwinding
        step = self.step
        if step >= self._calm_until:
            if self._stale:
                self._ask(me)
            if step >= self._calm_until:
                me.point, me.shared, me.write = name, shared, write
                chosen = self._pick(me, True)
                if chosen is not me:
                    self._go(chosen)
                return
        # What follows is _pick() in short, for it is what most steps are.
        if step > self._last_deviation and self._at_point(self, me):
            self._end = End.CUT
            self._go(None)
        self.step = step + 1
        before = me.hash
        if shared is None:
            after = hash((before, name))
        else:
            cell = self._cells.get(shared)
            if cell is None:
                cell = self._cells[shared] = [hash(shared), 0]
            if write:
                after = hash((before, name, cell[0], cell[1]))
                cell[0], cell[1] = after, 0
                if self._watched and shared in self._watched:
                    self._written()
            else:
                after = hash((before, name, cell[0]))
                cell[1] += after * after
        me.hash = after

    def wait(
        self, name: str, shared: Hashable, until: Callable[[], bool], acts: bool = False
    ) -> None:
        """See :class:`guestfault.softkvm.preempt.Scheduler`."""
        me = self._current
        if me is None:
            if self._unwinding:
                raise _Abandoned
            return
        can = until()
        if can and self.step < self._calm_until:
            self.point(name, shared, True)
            return
        me.point, me.shared, me.write = name, shared, True
        self._waits(me, until, acts, can)
        chosen = self._pick(me, can)
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
        me.hash = self.after_choice(me, value, count)
        if self.record is not None:
            self.record.append(Step(me.index, f"{name}: {value}", None, False, [], True))
        return value

    def spawn(self, name: str, function: Callable[[], None]) -> None:
        """Another actor, from now on."""
        me = self._current
        if me is None:
            return
        me.hash = after = hash((me.hash, "spawns"))
        self._add(name, function, hash((after, name)))

    @property
    def current(self) -> str | None:
        """The name of the actor that runs."""
        return None if self._current is None else self._current.name

    def names(self) -> list[str]:
        """The actors' names by index, until the run is abandoned."""
        return [actor.name for actor in self.actors]

    def _go(self, chosen: Actor | None) -> None:
        """Let ``chosen`` run, or none; returns when the caller is to run again."""
        if chosen is None:
            self._hub.switch()
        else:
            self._current = chosen
            self._switch_to(chosen)

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
