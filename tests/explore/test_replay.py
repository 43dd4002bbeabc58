from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestfault.dialect.record import Dialect
from guestfault.errors import GuestfaultError
from guestfault.explore.replay import BadReplay, Schedule, parse, record, replay, replay_string
from guestfault.explore.scenario import Kind, Scenario
from guestfault.explore.search import Bound, explore

deviations = st.lists(
    st.tuples(st.integers(0, 999), st.integers(0, 701), st.booleans()),
    unique_by=lambda deviation: deviation[0],
).map(sorted)


@given(found=deviations, digest=st.integers(0, 2**32 - 1))
def test_a_string_says_the_whole_schedule(found: list[tuple[int, int, bool]], digest: int) -> None:
    schedule = Schedule(
        "a-scenario",
        "linux-6.8",
        tuple((step, value) for step, value, _ in found),
        frozenset(step for step, _, is_choice in found if is_choice),
        digest,
    )
    assert parse(str(schedule)) == schedule
    assert str(schedule).isprintable()
    assert not set(str(schedule)) & set(" \"'$&;<>|*?()[]{}~#!\\")  # no shell quotes needed


def test_a_string_looks_like_this() -> None:
    found = ((12, 1), (30, 0), (41, 1), (50, 27))
    schedule = Schedule("clobbered", "v4", found, frozenset({41}), 0x8C1F2A3B)
    assert str(schedule) == "clobbered/v4/12b.30a.41=1.50ab/8c1f2a3b"


ops = st.one_of(
    st.tuples(st.sampled_from(["read", "write"]), st.integers(0, 1), st.just(0)),
    st.tuples(st.just("wait"), st.just(0), st.integers(0, 1)),
    st.tuples(st.just("choose"), st.just(0), st.just(2)),
    st.tuples(st.just("spawn"), st.just(0), st.just(1)),
)


@pytest.mark.timeout(60)
@settings(max_examples=60, deadline=None)
@given(
    threads=st.lists(st.lists(ops, min_size=1, max_size=4), min_size=2, max_size=3),
)
def test_a_replay_makes_the_same_steps_and_comes_to_the_same(
    program: Callable[..., Scenario],
    dialect: Dialect,
    threads: list[list[tuple[str, int, int]]],
) -> None:
    """Of whatever schedules a search gives as examples, and of the counts it gives with them."""
    scenario, bound = program(*threads), Bound(2, schedules=200)
    for kind, example in explore(scenario, dialect, bound).tally.examples.items():
        trace = record(scenario, dialect, example.deviations)
        assert trace.verdict == (kind, example.text)
        assert (len(trace.steps), trace.preemptions) == (example.steps, example.preemptions)
        text = replay_string(trace)
        again = replay(text, {scenario.name: scenario}, {dialect.name: dialect})
        assert again == trace
        assert replay_string(again) == text


def test_a_string_of_other_code_is_refused_in_one_line(
    program: Callable[..., Scenario], dialect: Dialect, lost_update: Scenario
) -> None:
    example = explore(lost_update, dialect, Bound(1)).tally.examples[Kind.LOST]
    text = replay_string(record(lost_update, dialect, example.deviations))
    changed = program([("read", 0, 0), ("read", 1, 0), ("write", 0, 1)], [("write", 0, 1)])
    with pytest.raises(BadReplay, match="made by another version of the code") as raised:
        replay(text, {"lost-update": changed}, {"seed": dialect})
    assert isinstance(raised.value, GuestfaultError)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "not of the form"),
        ("a/b/c", "not of the form"),
        ("program/seed/1b/0123456g", "not of the form"),
        ("program/seed/1b2a/01234567", "'1b2a' is no step"),
        ("program/seed/b1/01234567", "'b1' is no step"),
        ("program/seed/2b.1a/01234567", "'1a' is no step"),
        ("other/seed/-/01234567", "there is no scenario 'other'"),
        ("program/v9/-/01234567", "there is no dialect 'v9'"),
        ("program/seed/-/01234567", "the steps are not the same"),
        ("program/seed/900b/01234567", "it ended before step 900"),
        ("program/seed/1c/01234567", "actor 2 cannot go on at step 1"),
    ],
)
def test_a_bad_string_says_what_is_wrong(
    program: Callable[..., Scenario], dialect: Dialect, text: str, why: str
) -> None:
    scenario = program([("write", 0, 1)], [("write", 0, 1)])
    with pytest.raises(BadReplay, match=why):
        replay(text, {"program": scenario}, {"seed": dialect})


def test_a_question_that_does_not_arise_is_not_replayed(dialect: Dialect) -> None:
    scenario = Scenario("program", "", "", pytest.fail, lambda _: "no slot flag")
    with pytest.raises(BadReplay, match="program is no question for seed: no slot flag"):
        replay("program/seed/-/01234567", {"program": scenario}, {"seed": dialect})
