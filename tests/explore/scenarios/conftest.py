"""Schedules played by hand: who goes on, and up to where."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextvars import Context

import pytest
from greenlet import getcurrent, greenlet

from guestfault.dialect.published import DIALECTS
from guestfault.explore import scheduler
from guestfault.explore.scenario import Verdict, World
from guestfault.explore.scenarios import SCENARIOS
from guestfault.softkvm.preempt import scheduled_by

END = ""
Move = tuple[str, str]
"""An actor, and the preemption point before which it stops: END for as far as it comes."""


class Director:
    """Plays one schedule.  An actor that waits is as far as it comes."""

    record = None

    def __init__(self, world: World, choices: Mapping[str, Sequence[int]]) -> None:
        self._hub = getcurrent()
        self._world = world
        self._choices = {name: list(values) for name, values in choices.items()}
        self._carriers: dict[str, greenlet] = {}
        self._at: dict[str, str] = {}
        self._until: dict[str, Callable[[], bool]] = {}
        self.current: str | None = None
        self._stop_at = END
        for name, function in world.actors.items():
            self.spawn(name, function)

    def spawn(self, name: str, function: Callable[[], None]) -> None:
        carrier = greenlet(function, self._hub)
        carrier.gr_context = Context()
        self._carriers[name] = carrier
        self._at[name] = "begin"

    def choose(self, name: str, count: int) -> int:
        values = self._choices.get(name)
        return values.pop(0) if values else 0

    def point(self, name: str, shared: Hashable, write: bool) -> None:
        assert self.current is not None
        if self._stop_at and name == self._stop_at:
            self._at[self.current] = name
            self._hub.switch()

    def wait(
        self, name: str, shared: Hashable, until: Callable[[], bool], acts: bool = False
    ) -> None:
        me = self.current
        assert me is not None
        while not until():
            self._at[me], self._until[me] = name, until
            self._hub.switch()
        self._until.pop(me, None)

    def play(self, moves: Sequence[Move]) -> Verdict:
        """Make the moves, then let everybody go on in turn."""
        with scheduled_by(self):
            for name, stop_at in moves:
                reached = self._advance(name, stop_at)
                assert reached or not stop_at, f"{name} does not come to {stop_at!r}"
            while any(self._advance(name, END, idle=True) for name in list(self._carriers)):
                pass
        stuck = [f"{n} at {self._at[n]}" for n, c in self._carriers.items() if not c.dead]
        return self._world.verdict(stuck="; ".join(stuck) or None)

    def _advance(self, name: str, stop_at: str, idle: bool = False) -> bool:
        """Whether the actor came to ``stop_at``; with ``idle``, whether it did anything."""
        carrier = self._carriers[name]
        until = self._until.get(name)
        if carrier.dead or (until is not None and not carrier.gr_context.run(until)):
            assert idle, f"{name} cannot go on: it is at {self._at[name]!r}"
            return False
        self.current, self._stop_at = name, stop_at
        carrier.switch()
        return idle or (not carrier.dead and self._at[name] == stop_at)


@pytest.fixture
def play(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Verdict]:
    """``play(scenario, dialect, moves, **choices)``: a verdict."""

    def run(
        scenario: str,
        dialect: str,
        moves: Sequence[Move] = (),
        choices: Mapping[str, Sequence[int]] | None = None,
    ) -> Verdict:
        world = SCENARIOS[scenario].build(DIALECTS[dialect])
        director = Director(world, choices or {})
        monkeypatch.setattr(scheduler, "_running", director)
        return director.play(moves)

    return run
