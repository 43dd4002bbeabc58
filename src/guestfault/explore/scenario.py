"""What is explored: a small world, the threads in it, and what must hold of it whatever the order.

A :class:`Scenario` builds a fresh :class:`World` for each schedule.  Its actors are run by
:mod:`guestfault.explore.scheduler`, one step at a time, in an order that the search chooses; what
came of it is a :class:`Verdict`.

What the search takes for granted of a world:

- It is built the same each time, and its actors do the same whenever they read the same: no clocks,
  no random numbers, no ``id()``.  What may turn out one way or the other goes through
  :func:`guestfault.explore.scheduler.choose`, and is then part of the schedule.
- **Whatever actors share stands behind a point that names it**, the world's own variables too; else
  two orders that differ count as one.  A verdict must not depend on the order of what is not
  behind a point either: no common log of everything, unless a point guards it.
- Building, :meth:`World.verdict` and :meth:`World.close` run outside the scheduler: there points
  do nothing, and a wait is a real one.  So nobody else's lock may be taken there.  Actors may use
  real locks only where no point or wait comes in between, for a lock that is held stops the only
  thread there is, and a reentrant one lets in every actor.
- When a schedule is given up half way, its actors are unwound as by an exception: their
  ``finally`` blocks run and points in them do nothing.

Keep worlds small and quick to build: there is one for every schedule, some thousands a second.

The scenarios themselves are in :mod:`guestfault.explore.scenarios`, which offers them by name as
``SCENARIOS: Mapping[str, Scenario]``; a name is lower-case letters, digits, ``-``.
"""

from __future__ import annotations

import enum
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol, runtime_checkable

from guestfault.dialect.record import Dialect

__all__ = ["Kind", "Recurring", "Scenario", "Verdict", "World"]


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
    """One instance of a scenario, about to run once.

    One whose class says ``rewindable = True`` runs again when all that it refers to is as it was
    when it was built (:mod:`guestfault.explore.rewind`); it is closed when the search is through.
    """

    @property
    def actors(self) -> Mapping[str, Callable[[], None]]:
        """The threads that are there from the beginning, by name."""

    def verdict(self, *, stuck: str | None) -> Verdict:
        """What it came to, when all actors have ended.

        ``stuck`` says why they have not: a deadlock, with who waits for what, or the step limit.
        """

    def close(self) -> None:
        """Release what it holds."""


@runtime_checkable
class Recurring(Protocol):
    """A :class:`World` whose actors may come back to where they were, and say so.

    Without it, a world that never ends is recognised by the step limit only.
    """

    def fingerprint(self) -> Hashable:
        """All that decides how it goes on, but for where its actors stand: equal means the same.

        Counters that only grow are left out.  It is asked for late in long schedules only.
        """


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
