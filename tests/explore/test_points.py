"""Everything that threads share stands behind a preemption point that names it.

The search takes two schedules for one where they only exchange steps that have nothing in common.
That is right as long as a thread's steps name all that it reads: then its own steps, and what the
things that they name have been through (its hash), settle which step comes next.  So two threads of
one hash that go on differently have read something that no point has named, and the search may
miss what came of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable

import pytest

from guestfault.dialect.published import DIALECTS
from guestfault.explore import walk
from guestfault.explore.scenario import Kind, Scenario, Verdict
from guestfault.explore.scenarios import SCENARIOS
from guestfault.explore.schedule import Actor
from guestfault.explore.scheduler import Scheduler
from guestfault.explore.search import Bound, explore
from guestfault.softkvm.preempt import preemption_point

Contradictions = set[tuple[str, Hashable, Hashable, Hashable]]
"""An actor, the step that it has taken, and the two that came next."""


class Noting(Scheduler):
    """Notes what comes after each hash."""

    after: dict[Hashable, tuple[Hashable, Hashable]]
    contradictions: Contradictions

    def run(self, *args, **kwargs):
        # What a choice comes to is in the hash of who has chosen, and not of what he then writes.
        self._chosen: list[Hashable] = []
        self._last: dict[Actor, Hashable] = {}
        return super().run(*args, **kwargs)

    def _note(self, actor: Actor | None, what: Hashable) -> None:
        if actor is None:
            return
        key = actor.uid, actor.hash, tuple(self._chosen)
        was = self.after.setdefault(key, what)
        if was != what:
            self.contradictions.add((actor.name, self._last.get(actor), was, what))
        self._last[actor] = what

    def point(self, name, shared, write=False):
        self._note(self._current, (name, shared, write))
        super().point(name, shared, write)

    def wait(self, name, shared, until, acts=False):
        self._note(self._current, (name, shared, True))
        super().wait(name, shared, until, acts)

    def choose(self, name, count):
        self._note(self._current, (name, count))
        value = super().choose(name, count)
        self._chosen.append((name, value))
        return value

    def gone(self, actor):
        if self._end is None and not self._unwinding:
            self._note(actor, "the end")
        super().gone(actor)


@pytest.fixture
def contradictions(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Contradictions]:
    def look(scenario: Scenario, dialect: str, bound: Bound) -> Contradictions:
        Noting.after, Noting.contradictions = {}, set()
        explore(scenario, DIALECTS[dialect], bound)
        return Noting.contradictions

    monkeypatch.setattr(walk, "Scheduler", Noting)
    return look


ASKED = [
    (name, dialect)
    for name in sorted(SCENARIOS)
    for dialect in ("seed", "linux-7.3", "userfault-v3")
    if SCENARIOS[name].applies(DIALECTS[dialect]) is None
]


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("name", "dialect"), ASKED)
def test_what_comes_next_follows_from_what_the_points_have_named(
    name: str, dialect: str, contradictions: Callable[..., Contradictions]
) -> None:
    """Invariant: equal hashes, equal next steps, in every scenario."""
    assert contradictions(SCENARIOS[name], dialect, Bound(2, schedules=500)) == set()


def test_a_read_that_no_point_names_is_found(
    contradictions: Callable[..., Contradictions],
) -> None:
    class Careless:
        """One thread writes a flag; the other looks at it, and says that it looks elsewhere."""

        def __init__(self) -> None:
            self.flag = False
            self.actors = {"reads": self._reads, "writes": self._writes}

        def _reads(self) -> None:
            preemption_point("look at something else", "something else")
            if self.flag:
                preemption_point("it is set", None)

        def _writes(self) -> None:
            preemption_point("set it", "flag", True)
            self.flag = True

        def verdict(self, *, stuck: str | None) -> Verdict:
            return Verdict(Kind.CORRECT, "")

        def close(self) -> None:
            pass

    scenario = Scenario("careless", "a program", "a test", lambda _: Careless())
    found = contradictions(scenario, "seed", Bound(1))
    assert {(who, what) for who, what, _, _ in found} == {
        ("reads", ("look at something else", "something else", False))
    }
