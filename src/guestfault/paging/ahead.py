"""Pages that are brought in before anybody has asked for them, and whether anybody would have.

A page that comes in ahead saves an exit if the guest then needs it, and is wasted if not.  Which of
the two it was, nobody can see: a page that is in makes no more faults.  So it is found out by
*withholding* a few.  Of every :data:`EVERY` pages that come in ahead one, drawn by lot, is filled
as all are but not let into the guest view.  To the guest it is absent like any other, and if it is
ever faulted on, it was wanted; it is let in then, and nothing has to be read for it.

What fraction of the withheld pages was wanted estimates what fraction of all those pages was
useful.  The lot does not look at how the guest goes about its memory, so the estimate is not
partial to any way of doing so; it is as rough as the withheld pages are few, so there is a span to
it (Wilson's, of 95 %).  A page is wanted only once the guest has come to it: one that was brought
in for a guest that was stopped before is not.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from math import sqrt
from random import randrange

__all__ = ["EVERY", "IN", "Ahead", "AheadCount", "draw"]

EVERY = 256
"""Of so many pages that come in ahead, one is withheld."""

IN = 1
"""What the pager writes down for a page that is filled, and not withheld."""

_Z = 1.96  # 95 % of a normal distribution lie so many deviations about its mean


class Ahead(IntEnum):
    """For what reason a page came in ahead.

    The value is what the pager writes down for it while it is withheld (0: absent; :data:`IN`).
    """

    AROUND = 2  # a neighbour was asked for (:mod:`~guestfault.paging.around`)
    PREFETCH = 3  # an earlier run had asked for it
    PUSH = 4  # sooner or later somebody would


@dataclass(slots=True)
class AheadCount:
    """Pages that came in for one reason.

    ``pages`` is all of them, ``withheld`` how many of these were kept out of the guest view, and
    ``wanted`` how many of those the guest then faulted on.
    """

    pages: int = 0
    withheld: int = 0
    wanted: int = 0

    @property
    def useful(self) -> float | None:
        """The fraction of ``pages`` that the guest would have faulted on, by estimate."""
        return self.wanted / self.withheld if self.withheld else None

    @property
    def useful_span(self) -> tuple[float, float] | None:
        """Between which fractions it is, 95 times in 100."""
        n = self.withheld
        if not n:
            return None
        p, z2 = self.wanted / n, _Z * _Z
        middle = (p + z2 / (2 * n)) / (1 + z2 / n)
        half = _Z * sqrt(p * (1 - p) / n + z2 / (4 * n * n)) / (1 + z2 / n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def add(self, other: AheadCount) -> None:
        """Count what another has counted."""
        self.pages += other.pages
        self.withheld += other.withheld
        self.wanted += other.wanted


def draw(run: range, asked: int | None = None) -> int | None:
    """The page of ``run`` that is to be withheld, if one is; never the one that was asked for."""
    place = randrange(EVERY)
    if asked is not None and run.start + place >= asked:
        place += 1
    return run[place] if place < len(run) else None
