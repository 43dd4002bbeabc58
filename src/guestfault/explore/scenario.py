"""What is explored: a small world, the threads in it, and what must hold of it whatever the order.

A :class:`Scenario` builds a fresh :class:`World` for each schedule.  Its actors are run by
:mod:`guestfault.explore.scheduler`, one step at a time, in an order that the search chooses; what
came of it is a :class:`Verdict`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from guestfault.dialect.record import Dialect

__all__ = ["Kind", "Scenario", "Verdict", "World"]


class Kind(enum.Enum):
    """What a schedule came to, from good to bad: the words of the table's cells."""

    CORRECT = "correct"
    BARE = "bare"  # the failure is honestly bare: nothing wrong was said, and nothing right either
    WARNED = "warned"  # the kernel's own assertion fired (WARN_ON_ONCE), and nothing worse came
    LOST = "information lost"  # an annotation was made, or was due, and userspace never saw it
    WRONG = "wrong information"  # userspace decodes a fault, and it is not the one that failed
    CORRUPTED = "another exit corrupted"
    STUCK = "a fault lost for ever"  # nobody can go on, or nobody gets anywhere
    MEMORY = "memory differs"  # from what the same guest leaves when it runs alone


class Verdict(NamedTuple):
    """What one schedule came to, and in a sentence why."""

    kind: Kind
    text: str = ""


class World(Protocol):
    """One instance of a scenario, about to run once."""

    @property
    def actors(self) -> Mapping[str, Callable[[], None]]:
        """The threads that are there from the beginning, by name."""

    def verdict(self, *, stuck: str | None) -> Verdict:
        """What it came to, when all actors have ended.

        ``stuck`` says why they have not: a deadlock, with who waits for what, or the step limit.
        """

    def close(self) -> None:
        """Release what it holds."""


@dataclass(frozen=True, slots=True)
class Scenario:
    """A question of the thread, as a world that can be run.

    ``applies`` says of a dialect whether the question arises there at all, and if not why not.
    """

    name: str
    title: str
    source: str  # the message that raises the question
    build: Callable[[Dialect], World]
    applies: Callable[[Dialect], str | None] = lambda _dialect: None
