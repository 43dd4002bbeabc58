from __future__ import annotations

import ctypes
import dataclasses
import threading
from collections import deque
from collections.abc import Callable
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, SimpleNamespace
from typing import Any

import pytest
from greenlet import greenlet
from hypothesis import given
from hypothesis import strategies as st

from guestfault.dialect.published import DIALECTS
from guestfault.dialect.record import Dialect
from guestfault.explore.rewind import CannotRewind, Snapshot, Worlds
from guestfault.explore.scenario import Kind, Scenario, Verdict
from guestfault.explore.scenarios import SCENARIOS
from guestfault.explore.schedule import End
from guestfault.explore.scheduler import Scheduler
from guestfault.explore.search import Bound, explore
from guestfault.explore.world import Machine

LOCK = type(threading.Lock())
RLOCK = type(threading.RLock())


def described(root: object) -> list[Any]:
    """All that is reached from ``root``, in a form that is equal for equal structures.

    Every object gets a number when it is first met, by which it is referred to.
    """
    numbers: dict[int, int] = {}
    met: list[object] = []
    lines: list[Any] = []

    def refer(thing: Any) -> Any:
        if isinstance(thing, int | str | bytes | None | type):
            return thing
        if isinstance(thing, BuiltinFunctionType | RLOCK):
            return type(thing)
        if id(thing) not in numbers:
            numbers[id(thing)] = len(met)
            met.append(thing)
        return "object", numbers[id(thing)]

    refer(root)
    for thing in met:  # which grows meanwhile
        lines.append((type(thing).__qualname__, *map(refer, contents(thing))))
    return lines


def contents(thing: Any) -> list[Any]:
    match thing:
        case dict():
            return [x for item in thing.items() for x in item]
        case set() | frozenset():
            return sorted(thing, key=repr)
        case list() | tuple() | deque():
            return list(thing)
        case bytearray() | ctypes.Structure() | memoryview():
            return [bytes(thing)]
        case CellType():
            return [thing.cell_contents]
        case FunctionType():
            return [thing.__qualname__, *(thing.__closure__ or ()), *(thing.__defaults__ or ())]
        case MethodType():
            return [thing.__func__, thing.__self__]
        case LOCK():
            return [thing.locked()]
    if dataclasses.is_dataclass(thing) and thing.__dataclass_params__.frozen:
        # It may keep what follows from its fields, and be another world's as well.
        return [getattr(thing, field.name) for field in dataclasses.fields(thing)]
    slots = [n for base in type(thing).__mro__ for n in vars(base).get("__slots__", ())]
    held = {name: getattr(thing, name) for name in slots if hasattr(thing, name)}
    return [x for item in (held | getattr(thing, "__dict__", {})).items() for x in item]


@pytest.mark.timeout(120)
@pytest.mark.filterwarnings("ignore::UserWarning")  # the kernel's WARN_ON_ONCE
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_world_that_was_put_back_is_as_one_that_was_built(name: str) -> None:
    """In every object, whatever was run in between, to its end or given up half way."""
    scenario = SCENARIOS[name]
    for dialect in DIALECTS.values():
        if scenario.applies(dialect) is not None:
            continue
        built = described(scenario.build(dialect))
        worlds = Worlds(scenario, dialect)
        scheduler = Scheduler()
        for give_up_at in (None, 9, 17, 30):
            world = worlds.fresh()
            run = scheduler.run(world, (), GiveUp(give_up_at))
            if run.end is not End.CUT:
                world.verdict(stuck=run.stuck)
            scheduler.abandon()
            worlds.done_with(world)
        assert described(worlds.fresh()) == built


class GiveUp:
    """An explorer that ends a run at a step."""

    def __init__(self, step: int | None) -> None:
        self.step = step

    def at_point(self, decisions: Any, *_: object) -> bool:
        return decisions.step == self.step

    at_switch = at_choice = at_point


@pytest.mark.timeout(60)
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_search_finds_the_same_in_worlds_that_are_built_each_time(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    scenario = SCENARIOS[name]
    # The first to which it is a question, the seed's own before others.
    dialects = [DIALECTS["seed"], *DIALECTS.values()]
    dialect = next(dialect for dialect in dialects if scenario.applies(dialect) is None)
    bound = Bound(2, schedules=150)
    put_back = explore(scenario, dialect, bound)
    monkeypatch.setattr(Machine, "rewindable", False)
    built = explore(scenario, dialect, bound)
    assert (put_back.tally, put_back.explored) == (built.tally, built.explored)


class Slotted:
    __slots__ = ("later", "value")

    def __init__(self, value: object) -> None:
        self.value = value


class Pair(ctypes.Structure):
    _fields_ = (("a", ctypes.c_uint32), ("b", ctypes.c_uint64))


def everything() -> SimpleNamespace:
    """One of each kind of thing, the second reached in several ways."""
    many: list[Any] = [1, 2]
    count = 0

    def counter() -> int:
        nonlocal count
        count += 1
        return count

    return SimpleNamespace(
        many=many,
        named={"many": many, "x": 1},
        several={1, 2},
        queue=deque([many]),
        area=bytearray(b"abc"),
        view=memoryview(bytearray(b"view")),
        pair=Pair(1, 2),
        slotted=Slotted(many),
        lock=threading.Lock(),
        counter=counter,
        bound=many.append,
        wrapped=(Slotted(3),),
    )


CHANGES: dict[str, Callable[[SimpleNamespace], object]] = {
    "append": lambda x: x.many.append(3),
    "replace": lambda x: setattr(x, "many", list(x.many)),
    "clear": lambda x: x.named.clear(),
    "key": lambda x: x.named.update(y=2),
    "order": lambda x: x.named.update(many=x.named.pop("many", 0)),
    "discard": lambda x: x.several.discard(1),
    "rotate": lambda x: x.queue.append(0),
    "write": lambda x: x.area.__setitem__(0, 0),
    "extend": lambda x: x.area.extend(b"def"),
    "poke": lambda x: x.view.__setitem__(1, 0),
    "field": lambda x: setattr(x.pair, "b", 7),
    "slot": lambda x: setattr(x.slotted, "value", None),
    "lock": lambda x: x.lock.acquire(blocking=False),
    "count": lambda x: x.counter(),
    "within": lambda x: setattr(x.wrapped[0], "value", x),
}


@given(rounds=st.lists(st.lists(st.sampled_from(sorted(CHANGES)), max_size=8), max_size=4))
def test_whatever_is_changed_is_put_back_as_often_as_one_likes(rounds: list[list[str]]) -> None:
    thing = everything()
    before = described(thing)
    snapshot = Snapshot(thing)
    for changes in rounds:
        for change in changes:
            CHANGES[change](thing)
        snapshot.restore()
        assert described(thing) == before


def test_a_lock_that_was_held_is_held_again() -> None:
    lock = threading.Lock()
    with lock:
        snapshot = Snapshot([lock])
    snapshot.restore()
    assert lock.locked()


@pytest.mark.parametrize("made", [iter([1]), (x for x in "a"), greenlet(), BaseException()])
def test_what_may_hold_something_out_of_sight_is_refused(made: object) -> None:
    with pytest.raises(CannotRewind, match=r"^list\[1\]\.found is of type ") as caught:
        Snapshot([0, SimpleNamespace(found=made)])
    assert caught.value.path == "list[1].found"


class Counted:
    """A world that counts how often it is built and closed."""

    built = closed = 0

    def __init__(self, _: Dialect) -> None:
        type(self).built += 1
        self.actors = {"one": lambda: None}

    def verdict(self, *, stuck: str | None) -> Verdict:
        return Verdict(Kind.CORRECT)

    def close(self) -> None:
        type(self).closed += 1


@pytest.mark.parametrize("rewindable", [False, True])
def test_a_world_is_closed_when_it_is_over_with_it(dialect: Dialect, rewindable: bool) -> None:
    made = type("Made", (Counted,), {"rewindable": rewindable})
    worlds = Worlds(Scenario("counted", "", "", made), dialect)
    for _ in range(3):
        worlds.done_with(worlds.fresh())
    worlds.close()
    assert (made.built, made.closed) == ((1, 1) if rewindable else (3, 3))
