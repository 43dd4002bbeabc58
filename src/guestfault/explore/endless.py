"""Schedules that do not end: told apart from long ones, and from unfair ones.

A thread that tries again and again is no error as long as somebody else could change what it
meets; then it is the policy that is at fault, which lets it go on and the other wait.  So in a long
schedule, from step :attr:`~guestfault.explore.schedule.Limits.watch_after` on, there is a watch:

- A world that is :class:`~guestfault.explore.scenario.Recurring` tells when it is where it has been
  before, with everybody standing where he stood.  When the same steps have led there several times:
  if someone who could go on was left out in between, he goes next, and that is no preemption.  If
  everyone was there who could be, it will go on like that for ever: a livelock.
- In other worlds, whoever has gone on for :attr:`~guestfault.explore.schedule.Limits.patience`
  steps while others could lets another pass.

:attr:`~guestfault.explore.schedule.Limits.steps` ends what is still under way then.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from guestfault.explore.scenario import Recurring, World
from guestfault.explore.schedule import Actor, Limits

__all__ = ["Watch", "deadlock", "watch_from"]

_TAIL = 12
_ROUNDS, _REPEATED = 3, 24  # how often, and for how many steps, before it counts as for ever


def watch_from(limits: Limits, world: World) -> int:
    """The step from which on there is something to watch for."""
    if hasattr(world, "fingerprint"):  # isinstance(world, Recurring), in a tenth of the time
        return limits.watch_after
    # Nobody's patience ends before, and what is remembered is the tail of what must end.
    first = min(limits.watch_after + limits.patience, limits.steps - _TAIL)
    return max(limits.watch_after, first)


class Watch:
    """Watches one schedule from some step on."""

    def __init__(self, limits: Limits, world: World) -> None:
        self._limits = limits
        self._world = world if isinstance(world, Recurring) else None
        self._threads = len(world.actors)
        self._steps: list[tuple[int, str]] = []
        self._names: dict[int, str] = {}
        self._seen: dict[Hashable, int] = {}

    def took(self, actor: Actor) -> None:
        """The actor takes the step that it was about to take."""
        role = self._role(actor)
        self._steps.append((role, actor.point))
        self._names[role] = actor.name

    def left_out(
        self,
        step: int,
        turn: int,
        last: Actor | None,
        others: Sequence[Actor],
        live: Sequence[Actor],
    ) -> list[Actor] | str:
        """Who of ``others`` must be let go on instead of ``last``, or why this has no end.

        Nobody, as a rule.  ``turn`` is the step at which ``last`` has begun to go on; ``live`` are
        all who have not ended.
        """
        if self._world is not None:
            state = (
                self._world.fingerprint(),
                None if last is None else self._role(last),
                tuple((self._role(actor), actor.point, actor.shared) for actor in live),
            )
            before = self._seen.get(state, step)
            self._seen[state] = step
            if before < step and self._repeats(step - before):
                left_out = [actor for actor in others if actor.ran < before]
                return left_out or f"for ever the same: {self._where(step - before)}"
        elif others and step - max(turn, self._limits.watch_after) >= self._limits.patience:
            return list(others)
        if step >= self._limits.steps:
            return f"no end in {step} steps; the last: {self._where(_TAIL)}"
        return []

    def _repeats(self, period: int) -> bool:
        """Whether the same steps were taken again and again, and not only came to a like place.

        What a thread keeps to itself, no fingerprint tells.
        """
        steps = self._steps
        rounds = max(_ROUNDS, -(-_REPEATED // period))
        if len(steps) < rounds * period:
            return False
        return all(steps[-i] == steps[-i - period] for i in range(1, (rounds - 1) * period + 1))

    def _role(self, actor: Actor) -> int:
        """One worker is like another: new ones may come for ever."""
        return min(actor.index, self._threads)

    def _where(self, count: int) -> str:
        """Who took the last ``count`` steps, and where."""
        said, who = [], -1
        for role, point in self._steps[-count:]:
            said.append(f"{point!r}" if role == who else f"{self._names[role]} at {point!r}")
            who = role
        return ", ".join(said)


def deadlock(live: Sequence[Actor]) -> str:
    """Who waits where, when nobody can go on."""
    return "deadlock: " + "; ".join(f"{a.name} waits at {a.point!r}" for a in live)
