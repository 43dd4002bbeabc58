"""The words in which a schedule is spoken of: actors, steps, deviations, and how a run ends."""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Sequence
from contextvars import Context
from dataclasses import dataclass
from typing import NamedTuple

from greenlet import greenlet

__all__ = [
    "DEFAULT_LIMITS",
    "Actor",
    "Deviation",
    "End",
    "Impossible",
    "Limits",
    "Run",
    "Step",
    "WorldDefect",
    "next_in_turn",
]

Deviation = tuple[int, int]
"""(number of the step, index of the actor that takes it or value chosen)."""


class Impossible(Exception):
    """The deviations do not fit this world: whoever was to go on at a step could not."""


class WorldDefect(Exception):
    """An actor raised, or the world could not judge: the scenario or what it runs is broken.

    ``where`` is the schedule, as far as it is known.  Not a verdict about a dialect.
    """

    def __init__(self, where: str, text: str) -> None:
        super().__init__(f"{where}: {text}")
        self.where = where
        self.text = text

    def __reduce__(self) -> tuple[type[WorldDefect], tuple[str, str]]:
        return WorldDefect, (self.where, self.text)


class End(enum.Enum):
    """How a run ended."""

    COMPLETED = enum.auto()  # all actors have
    CUT = enum.auto()  # the explorer had enough
    STUCK = enum.auto()  # nobody can go on, or nobody gets anywhere


@dataclass(frozen=True, slots=True)
class Limits:
    """When a schedule counts as unfair, or as endless: see :mod:`guestfault.explore.endless`."""

    passes: int = 3
    steps: int = 2000
    watch_after: int = 100
    patience: int = 300


DEFAULT_LIMITS = Limits()


class Step(NamedTuple):
    """One step as recorded: ``actor`` is an index, ``notes`` what the world had to say of it."""

    actor: int
    name: str
    shared: Hashable
    write: bool
    notes: list[str]
    is_choice: bool = False


class Run(NamedTuple):
    """What came of one run, before the world has judged it."""

    end: End
    steps: int
    preemptions: int
    stuck: str | None


class Actor:
    """A thread of the world, and the step that it is about to take.

    ``until`` is what it waits for, ``acts`` whether that does something besides, and ``can`` what
    it has said then; ``ran`` the number of its last step (not kept up in the first part of a
    schedule), ``passed`` how often it was passed over since.
    """

    __slots__ = (
        "acts",
        "can",
        "carrier",
        "context",
        "function",
        "hash",
        "index",
        "name",
        "passed",
        "point",
        "ran",
        "shared",
        "uid",
        "until",
        "write",
    )

    def __init__(self, index: int, name: str, function: Callable[[], None], uid: int) -> None:
        self.index = index
        self.name = name
        self.function = function
        self.uid = self.hash = uid
        self.point = "begin"
        self.shared: Hashable = None  # such a step touches nothing
        self.write = False
        self.until: Callable[[], bool] | None = None
        self.acts = self.can = False
        self.context = Context()
        self.carrier: greenlet | None = None
        self.ran = -1
        self.passed = 0


def next_in_turn(last: Actor | None, others: Sequence[Actor]) -> Actor:
    """The first after ``last``, beginning anew after the last of all."""
    if last is not None:
        for actor in others:
            if actor.index > last.index:
                return actor
    return others[0]
