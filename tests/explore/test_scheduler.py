from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextvars import ContextVar

import pytest

from guestfault.explore.scenario import Kind, Verdict
from guestfault.explore.schedule import End, Impossible, Limits, Step
from guestfault.explore.scheduler import (
    Scheduler,
    annotate,
    choose,
    current_actor,
    recording,
    spawn,
)
from guestfault.softkvm.preempt import Mutex, preemption_point, wait

Actors = Mapping[str, Callable[[], None]]


class Plain:
    """A world of these actors."""

    def __init__(self, **actors: Callable[[], None]) -> None:
        self.actors: Actors = actors

    def verdict(self, *, stuck: str | None) -> Verdict:
        return Verdict(Kind.STUCK if stuck else Kind.CORRECT, stuck or "")

    def close(self) -> None:
        pass


class Fingerprinted(Plain):
    """A world that can tell where it is."""

    def __init__(self, where: Callable[[], Hashable], **actors: Callable[[], None]) -> None:
        super().__init__(**actors)
        self.fingerprint = where


@contextlib.contextmanager
def scheduler(limits: Limits | None = None) -> Iterator[Scheduler]:
    made = Scheduler(limits) if limits is not None else Scheduler()
    try:
        yield made
    finally:
        made.abandon()


def test_whoever_runs_goes_on_until_it_waits_or_ends() -> None:
    order: list[str] = []
    open_ = []

    def first() -> None:
        preemption_point("first: look", "x")
        order.append("first")
        wait("first: until open", "y", lambda: bool(open_))
        order.append("first again")

    def second() -> None:
        for _ in range(2):
            preemption_point("second: write", "x", True)
            order.append("second")
        open_.append(True)

    with scheduler() as s:
        run = s.run(Plain(first=first, second=second))
    assert order == ["first", "second", "second", "first again"]
    assert (run.end, run.preemptions) == (End.COMPLETED, 0)


def test_a_deviation_is_a_preemption_where_the_actor_could_go_on() -> None:
    def act() -> None:
        preemption_point("one", "x", True)
        preemption_point("two", "x", True)

    with scheduler() as s:
        steps: list[Step] = []
        run = s.run(Plain(a=act, b=act), [(1, 1)], record=steps)
    assert run.preemptions == 1
    assert [step.actor for step in steps] == [0, 1, 1, 1, 0, 0]
    assert [step.name for step in steps] == ["begin", "begin", "one", "two", "one", "two"]


@pytest.mark.parametrize("deviations", [[(0, 2)], [(9, 0)], [(1, 0), (2, 1)]])
def test_deviations_that_do_not_fit_are_refused(deviations: list[tuple[int, int]]) -> None:
    def blocked() -> None:
        wait("for ever", "x", lambda: False)

    with scheduler() as s, pytest.raises(Impossible):
        s.run(Plain(a=lambda: None, b=blocked), deviations)


def test_a_context_variable_belongs_to_its_actor_and_to_its_condition() -> None:
    """What is per thread in the kernel half is a context variable: kvm_running_vcpu."""
    variable: ContextVar[str] = ContextVar("variable", default="nobody's")
    seen: dict[str, str] = {}
    asked: list[str] = []

    def actor(name: str) -> Callable[[], None]:
        def run() -> None:
            assert variable.get() == "nobody's"
            variable.set(name)
            preemption_point("meet", "x", True)

            def met() -> bool:
                asked.append(f"{name} as {variable.get()}")
                return len(seen) == 2 or name == "b"

            wait("meet", "x", met)
            seen[name] = variable.get()
            if name == "b":
                seen["c"] = "there"

        return run

    with scheduler() as s:
        for _ in range(2):  # carriers are used again, contexts are not
            seen.clear()
            s.run(Plain(a=actor("a"), b=actor("b")), [(2, 1)])
            assert seen == {"a": "a", "b": "b", "c": "there"}
    assert set(asked) == {"a as a", "b as b"}
    assert variable.get() == "nobody's"


def test_a_deadlock_says_who_waits_where() -> None:
    with scheduler() as s:
        run = s.run(Plain(a=lambda: wait("for nothing", "x", lambda: False)))
    assert (run.end, run.stuck) == (End.STUCK, "deadlock: a waits at 'for nothing'")


def test_a_given_up_schedule_is_unwound() -> None:
    """Its locks are free again, and points in its clean-up do nothing."""
    mutex = Mutex("mutex")
    done: list[str] = []

    def holder() -> None:
        try:
            with mutex:
                wait("for ever", "x", lambda: False)
        finally:
            preemption_point("clean-up", "y", True)
            done.append("cleaned up")

    with scheduler() as s:
        s.run(Plain(a=holder, b=holder))
        assert done == []
    assert done == ["cleaned up", "cleaned up"]
    with mutex:
        pass


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_what_an_actor_raises_comes_out_of_the_run(error: type[BaseException]) -> None:
    def bad() -> None:
        preemption_point("bad", "x")
        raise error

    with scheduler() as s:
        with pytest.raises(error):
            s.run(Plain(good=lambda: wait("ever", "y", lambda: False), bad=bad))
        s.abandon()
        assert s.run(Plain(a=lambda: None)).end is End.COMPLETED


def test_workers_are_actors() -> None:
    order: list[str] = []

    def parent() -> None:
        spawn("worker", lambda: order.append(str(current_actor())))
        preemption_point("go on", "x")
        order.append(str(current_actor()))

    with scheduler() as s:
        s.run(Plain(parent=parent))
        s.abandon()
        s.run(Plain(parent=parent), [(1, 1)])
    assert order == ["parent", "worker", "worker", "parent"]


def test_outside_a_run_nothing_is_scheduled() -> None:
    assert (choose("what", 3), current_actor(), recording()) == (0, None, False)
    annotate("to nobody")
    spawn("never", pytest.fail)


def test_notes_are_kept_when_recording_only() -> None:
    told: list[bool] = []

    def act() -> None:
        annotate("at the beginning")
        told.append(recording())
        value = choose("how many", 3)
        annotate(f"so {value}")

    with scheduler() as s:
        steps: list[Step] = []
        s.run(Plain(a=act), [(1, 2)], record=steps)
        s.abandon()
        s.run(Plain(a=act))
    assert [(step.name, step.notes) for step in steps] == [
        ("begin", ["at the beginning"]),
        ("how many: 2", ["so 2"]),
    ]
    assert told == [True, False]


SHORT = Limits(steps=200, watch_after=20, patience=30)


@pytest.mark.parametrize("recurring", [False, True])
def test_whoever_waits_busily_lets_the_other_pass(recurring: bool) -> None:
    """A thread that tries until another has done its part ends, and nobody was preempted."""
    ready: list[bool] = []

    def busy() -> None:
        preemption_point("busy: look", "ready")
        while not ready:
            preemption_point("busy: look again", "ready")

    def other() -> None:
        preemption_point("other: make ready", "ready", True)
        ready.append(True)

    actors = {"busy": busy, "other": other}
    world = Fingerprinted(lambda: bool(ready), **actors) if recurring else Plain(**actors)
    with scheduler(SHORT) as s:
        run = s.run(world)
    assert (run.end, run.preemptions) == (End.COMPLETED, 0)
    assert run.steps < 70


def test_a_livelock_is_found_and_says_who_goes_round_where() -> None:
    turn = [0]

    def pusher(me: int) -> Callable[[], None]:
        def run() -> None:
            while True:
                wait(f"wait for turn {me}", "turn", lambda: turn[0] == me)
                preemption_point(f"push to {1 - me}", "turn", True)
                turn[0] = 1 - me

        return run

    with scheduler(SHORT) as s:
        run = s.run(Fingerprinted(lambda: turn[0], a=pusher(0), b=pusher(1)))
    assert run.end is End.STUCK
    assert run.stuck is not None
    assert run.stuck.startswith("for ever the same: ")
    assert run.steps < SHORT.watch_after + 40
    for where in ("a at ", "b at ", "'push to 1'", "'wait for turn 1'"):
        assert where in run.stuck


def test_progress_is_no_livelock() -> None:
    """A world that is somewhere else each time only needs more steps."""
    count = [0]

    def worker() -> None:
        while count[0] < 100:
            preemption_point("work", "count", True)
            count[0] += 1

    with scheduler(SHORT) as s:
        assert s.run(Fingerprinted(lambda: count[0], a=worker)).end is End.COMPLETED


def test_the_step_limit_says_who_was_where() -> None:
    def endless() -> None:
        while True:
            preemption_point("again", "x")

    with scheduler(SHORT) as s:
        run = s.run(Plain(a=endless))
    assert run.steps == SHORT.steps
    assert run.stuck is not None
    assert run.stuck.startswith("no end in 200 steps; the last: a at 'again', 'again'")


def test_endless_choices_meet_the_step_limit() -> None:
    def endless() -> None:
        while True:
            choose("and again", 2)

    with scheduler(SHORT) as s:
        run = s.run(Plain(a=endless))
    assert run.stuck == "no end in 200 steps; the last: a chooses 'and again'"


@pytest.mark.parametrize("acts", [False, True])
def test_a_wait_that_acts_is_asked_when_others_write_what_it_depends_on(acts: bool) -> None:
    """By the next decision; one that does not act, only when a decision depends on it."""
    asked: list[int] = []
    steps = [0]

    def look() -> bool:
        asked.append(steps[0])
        return False

    def waiter() -> None:
        wait("wait", "x", look, acts=acts)

    def other() -> None:
        for shared, write in (("x", True), ("x", False), ("y", True), ("x", True), ("y", False)):
            preemption_point("other", shared, write)
            steps[0] += 1

    with scheduler() as s:
        run = s.run(Plain(waiter=waiter, other=other))
    assert run.stuck == "deadlock: waiter waits at 'wait'"
    # As it begins to wait; then after each write, or as the other has ended.
    assert asked == ([0, 1, 4] if acts else [0, 5])
