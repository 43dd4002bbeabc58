from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from guestfault.dialect.published import DIALECTS
from guestfault.dialect.record import Dialect
from guestfault.explore import search as search_module
from guestfault.explore.decisions import Decisions
from guestfault.explore.scenario import Kind, Scenario, Verdict
from guestfault.explore.scenarios import SCENARIOS
from guestfault.explore.schedule import Actor, Impossible, WorldDefect
from guestfault.explore.scheduler import Scheduler
from guestfault.explore.search import Bound, explore
from guestfault.softkvm.preempt import preemption_point

ANY_NUMBER = 99

cells = st.integers(0, 2)
ops = st.one_of(
    st.tuples(st.just("read"), cells, st.just(0)),
    st.tuples(st.just("write"), cells, st.integers(1, 2)),
    st.tuples(st.just("wait"), cells, st.integers(0, 1)),
    st.tuples(st.just("choose"), st.just(0), st.integers(1, 2)),
    st.tuples(st.just("spawn"), cells, st.integers(1, 3)),
)
two_threads = st.lists(st.lists(ops, min_size=1, max_size=4), min_size=2, max_size=2)
three_threads = st.lists(st.lists(ops, min_size=1, max_size=3), min_size=3, max_size=3)


@pytest.mark.timeout(120)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(threads=st.one_of(two_threads, three_threads), bound=st.sampled_from([0, 1, 2, 3]))
# Where somebody may not be passed over any more, to go on is not what it is to be let go on.
@example(threads=[[("write", 2, 2)], [("spawn", 2, 1)], [("wait", 2, 0), ("read", 2, 0)]], bound=0)
def test_hashing_loses_no_final_state(
    program: Callable[..., Scenario],
    dialect: Dialect,
    threads: list[list[tuple[str, int, int]]],
    bound: int,
) -> None:
    """The states in which a program can end within a bound are those of full enumeration.

    As this holds for each bound, hashing also finds each with the fewest preemptions.
    """
    every: set[str] = set()
    hashed: set[str] = set()
    limit = Bound(bound, schedules=4000)
    if explore(program(*threads, ended=every), dialect, limit, hashing=False).stopped:
        return  # more than can be enumerated here
    found = explore(program(*threads, ended=hashed), dialect, limit)
    assert found.stopped is None
    assert hashed == every


@pytest.mark.timeout(60)
@settings(max_examples=30, deadline=None)
@given(threads=two_threads)
def test_without_a_bound_too(
    program: Callable[..., Scenario], dialect: Dialect, threads: list[list[tuple[str, int, int]]]
) -> None:
    every: set[str] = set()
    hashed: set[str] = set()
    limit = Bound(ANY_NUMBER, schedules=4000)
    if explore(program(*threads, ended=every), dialect, limit, hashing=False).stopped:
        return
    found = explore(program(*threads, ended=hashed), dialect, limit)
    assert (hashed, found.exhausted) == (every, ANY_NUMBER)


@pytest.mark.timeout(60)
@settings(max_examples=40, deadline=None)
@given(threads=st.one_of(two_threads, three_threads), bound=st.integers(0, 3))
def test_how_a_round_is_cut_into_parts_loses_no_final_state(
    program: Callable[..., Scenario],
    dialect: Dialect,
    threads: list[list[tuple[str, int, int]]],
    bound: int,
) -> None:
    whole: set[str] = set()
    cut: set[str] = set()
    one = explore(program(*threads, ended=whole), dialect, Bound(bound))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search_module, "PART_SIZE", 2)
        other = explore(program(*threads, ended=cut), dialect, Bound(bound))
    assert cut == whole
    assert other.exhausted == one.exhausted == bound
    assert other.tally.counts.keys() == one.tally.counts.keys()


class Unwilling:
    """An explorer that looks at the state's hash, and cuts nothing."""

    def at_point(self, decisions: Decisions, actor: Actor) -> bool:
        one = actor.hash
        assert decisions.standing + one * one == decisions.state
        return self.look(decisions)

    def at_switch(self, decisions: Decisions, *_: object) -> bool:
        return self.look(decisions)

    def at_choice(self, decisions: Decisions, *_: object) -> bool:
        return self.look(decisions)

    def look(self, decisions: Decisions) -> bool:
        assert decisions.state == sum(actor.hash**2 for actor in decisions.actors)
        return False


@settings(max_examples=50, deadline=None)
@given(threads=st.one_of(two_threads, three_threads), at=st.integers(0, 6), who=st.integers(0, 2))
def test_the_state_is_the_sum_of_all_actors(
    program: Callable[..., Scenario],
    dialect: Dialect,
    threads: list[list[tuple[str, int, int]]],
    at: int,
    who: int,
) -> None:
    """It is kept as the sum of those who stand, and must be right whoever has moved last."""
    explorer, scheduler = Unwilling(), Scheduler()
    world = program(*threads).build(dialect)
    with contextlib.suppress(Impossible):
        try:
            scheduler.run(world, ((at, who),), explorer)
        finally:
            scheduler.abandon()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("dialect_name", ["seed", "linux-6.8"])
@pytest.mark.parametrize("name", ["async-ready", "invalidation", "pusha-then-ss", "slot-deleted"])
def test_to_ask_waits_that_act_at_each_decision_comes_to_the_same(
    name: str, dialect_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing but a write of what such a wait names changes what it says, or does."""
    found = []
    for _ in range(2):
        search = explore(SCENARIOS[name], DIALECTS[dialect_name], Bound(1, schedules=400))
        found.append((search.tally, search.explored, search.beyond, search.exhausted))
        monkeypatch.setattr(Decisions, "_ask", _ask_and_ask_again)
        monkeypatch.setattr(Decisions, "_waits", _wait_and_ask)
    assert found[0] == found[1]


_ask, _waits = Decisions._ask, Decisions._waits


def _ask_and_ask_again(self: Decisions, last: Actor | None) -> None:
    _ask(self, last)
    if self._watched:
        self._written()


def _wait_and_ask(
    self: Decisions, actor: Actor, until: Callable[[], bool], acts: bool, can: bool
) -> None:
    _waits(self, actor, until, acts, can)
    if acts:
        self._written()


def test_the_schedules_of_two_threads_are_counted_as_combinatorics_has_it(
    program: Callable[..., Scenario], dialect: Dialect
) -> None:
    """Two threads of 3 steps each (one is their beginning): 6 choose 3 orders."""
    threads = [[("write", 0, 1)] * 2] * 2
    found = explore(program(*threads), dialect, Bound(ANY_NUMBER), hashing=False)
    assert found.tally.completed == 20
    assert not found.beyond


def test_steps_that_have_nothing_in_common_are_tried_in_one_order(
    program: Callable[..., Scenario], dialect: Dialect
) -> None:
    threads = [[("write", i, 1)] * 6 for i in range(3)]
    found = explore(program(*threads), dialect, Bound(ANY_NUMBER))
    # 21! / 7!^3 orders, but only 8^3 states on the way; with who ran last, or was passed over, some
    # more decisions.
    assert found.explored < 4 * 8**3
    assert found.exhausted == ANY_NUMBER


def test_the_example_has_the_fewest_preemptions(lost_update: Scenario, dialect: Dialect) -> None:
    assert explore(lost_update, dialect, Bound(0)).tally.worst is Kind.CORRECT
    found = explore(lost_update, dialect, Bound(2)).tally
    assert found.worst is Kind.LOST
    assert found.examples[Kind.LOST].preemptions == 1
    assert found.examples[Kind.CORRECT].preemptions == 0


def test_what_is_left_says_that_there_is_more(lost_update: Scenario, dialect: Dialect) -> None:
    assert explore(lost_update, dialect, Bound(1)).beyond
    found = explore(lost_update, dialect, Bound(ANY_NUMBER))
    assert (found.exhausted, found.beyond, found.stopped) == (ANY_NUMBER, False, None)


def test_every_choice_is_made(program: Callable[..., Scenario], dialect: Dialect) -> None:
    ended: set[str] = set()
    threads = [[("choose", 0, 2), ("choose", 0, 1), ("write", 0, 0)]]
    explore(program(*threads, ended=ended), dialect, Bound(0))
    assert ended == {f"correct [{n}, 0, 0, 0] [{n}]" for n in range(4)}


def test_a_deadlock_is_a_verdict(program: Callable[..., Scenario], dialect: Dialect) -> None:
    ended: set[str] = set()
    threads = [[("wait", 0, 0), ("write", 1, 1)], [("wait", 1, 0), ("write", 0, 1)]]
    found = explore(program(*threads, ended=ended), dialect, Bound(2))
    assert found.tally.worst is Kind.STUCK
    assert len(ended) == 1


def test_the_limit_of_schedules_ends_it(program: Callable[..., Scenario], dialect: Dialect) -> None:
    threads = [[("read", 0, 0), ("write", 0, 1)] * 6] * 3
    found = explore(program(*threads), dialect, Bound(3, schedules=50))
    assert found.stopped == "limit of 50 schedules"
    assert found.tally.schedules == 50
    assert found.exhausted < 3


@pytest.mark.timeout(20)
def test_the_limit_of_time_ends_it(program: Callable[..., Scenario], dialect: Dialect) -> None:
    threads = [[("read", 0, 0), ("write", 0, 1)] * 30] * 3
    began = time.monotonic()
    found = explore(program(*threads), dialect, Bound(4, seconds=0.3))
    assert found.stopped == "limit of 0.3 seconds"
    assert time.monotonic() - began < 5


class Broken:
    """A world one of whose threads raises if it is not the first."""

    def __init__(self) -> None:
        self.first = True
        self.actors = {"good": self._good, "bad": self._bad}

    def _good(self) -> None:
        preemption_point("good", "x", True)
        self.first = False

    def _bad(self) -> None:
        preemption_point("bad", "x", True)
        if self.first:
            raise ZeroDivisionError("of the world's own")

    def verdict(self, *, stuck: str | None) -> Verdict:
        return Verdict(Kind.CORRECT)

    def close(self) -> None:
        pass


def test_an_exception_is_a_defect_and_no_verdict(dialect: Dialect) -> None:
    scenario = Scenario("broken", "", "", lambda _: Broken())
    with pytest.raises(WorldDefect, match="ZeroDivisionError: of the world's own") as raised:
        explore(scenario, dialect, Bound(2))
    assert raised.value.where.startswith("broken, seed, ((0, 1)")
