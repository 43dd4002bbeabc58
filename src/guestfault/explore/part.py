"""A part of a search, as it is handed to whoever does it and comes back.

Results go from one process to another, so there is nothing here but data.
"""

from __future__ import annotations

from dataclasses import dataclass

from guestfault.explore.schedule import DEFAULT_LIMITS, Limits
from guestfault.explore.tally import Tally

__all__ = ["Bound", "Item", "Link", "Part", "PartResult"]

Link = tuple["Link | None", int, int]
"""A schedule: the one it deviates from, where, and how."""
Item = tuple[int, Link | None]
"""A schedule to run, and the key of the decision that its last deviation leads to."""


@dataclass(frozen=True, slots=True)
class Bound:
    """How far a search goes.

    ``preemptions`` bounds every schedule; ``schedules`` and ``seconds`` the whole.  Where time ends
    a search its result depends on the machine.
    """

    preemptions: int = 2
    schedules: int | None = None
    seconds: float | None = None
    limits: Limits = DEFAULT_LIMITS


@dataclass(slots=True)
class Part:
    """Schedules to begin with, all with ``level`` preemptions.

    The part goes on with the next level as long as that has no more than ``deep``.
    """

    level: int
    items: list[Item]
    deep: int
    schedules: int | None = None  # the most to run


@dataclass(slots=True)
class PartResult:
    """What a part found, having come as far as ``level``.

    ``left`` have ``level`` preemptions and were not run, for the part was to run no more;
    ``items`` have one more.
    """

    level: int
    left: list[Item]
    items: list[Item]
    states: set[int]
    tally: Tally
    beyond: bool
    out_of_time: bool
