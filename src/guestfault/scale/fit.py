"""The costs of a machine, from the rates that were measured on it.

A coordinate search: each cost in turn is made larger and smaller by a step of its own, which grows
while that helps and shrinks while it does not.  An error beyond :data:`_TOLERATED` counts many
times, so that no point is given up for the sake of the others.
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import fields, replace

from guestfault.scale.compare import FITTED_AT, Point, compare
from guestfault.scale.costs import Costs

__all__ = ["fit", "loss"]

_TOLERATED, _BEYOND = 0.3, 200
_FIRST_STEP, _LEAST_STEP, _LARGEST_STEP = 0.25, 0.03, 0.5
_EFFORT = 0.3


def loss(points: Iterable[Point]) -> float:
    """How far the simulation is from what was measured; 0 is perfect."""
    errors = [abs(point.error) for point in points]
    return sum(e**2 + _BEYOND * max(0.0, e - _TOLERATED) ** 2 for e in errors)


def fit(start: Costs, seconds: float) -> tuple[Costs, float]:
    """Search from ``start`` for so long: the best costs found and their :func:`loss`."""
    names = [f.name for f in fields(Costs) if f.type == "float"]
    step = dict.fromkeys(names, _FIRST_STEP)
    best = start
    least = loss(compare(best, FITTED_AT, effort=_EFFORT))
    ends = time.monotonic() + seconds
    while time.monotonic() < ends and max(step.values()) > _LEAST_STEP:
        for name in names:
            if time.monotonic() > ends:
                break
            for factor in (1 + step[name], 1 / (1 + step[name])):
                changed = {name: getattr(best, name) * factor}
                tried = replace(best, **changed)
                found = loss(compare(tried, FITTED_AT, effort=_EFFORT))
                if found < least:
                    best, least = tried, found
                    step[name] = min(_LARGEST_STEP, step[name] * 1.3)
                    break
            else:
                step[name] = max(_LEAST_STEP, step[name] * 0.6)
    return best, least
