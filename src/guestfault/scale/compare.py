"""The published tables beside the simulated ones."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from statistics import median

from guestfault.scale.costs import Costs
from guestfault.scale.model import Way, pages_per_second
from guestfault.scale.published import TABLES, VCPUS, Published

__all__ = ["FITTED_AT", "Point", "compare", "median_error", "worst_error"]

FITTED_AT = (1, 4, 16, 128, 256)
"""The numbers of vCPUs whose points the published machine's costs were fitted to.

The others were kept to judge it by."""


@dataclass(frozen=True, slots=True)
class Point:
    """One published figure, thousands of pages per second, and what the simulation says."""

    table: Published
    way: Way
    vcpus: int
    published: int
    simulated: float

    @property
    def fitted(self) -> bool:
        """Whether the costs were fitted to it."""
        return self.vcpus in FITTED_AT

    @property
    def error(self) -> float:
        """Relative to the published figure; positive if the simulation is faster."""
        return self.simulated / self.published - 1


def compare(
    costs: Costs, vcpus: Collection[int] = VCPUS, *, effort: float = 1.0
) -> Iterator[Point]:
    """Simulate every point of both tables at these numbers of vCPUs."""
    for table in TABLES:
        for way, figures in ((Way.UFFD, table.uffd), (Way.EXITS, table.exits)):
            for n, published in zip(VCPUS, figures, strict=True):
                if n in vcpus:
                    rate = pages_per_second(costs, n, way, table.layout, effort=effort) / 1e3
                    simulated = rate / n if table.per_vcpu else rate
                    yield Point(table, way, n, published, simulated)


def median_error(points: Collection[Point]) -> float:
    """The median of the errors' sizes."""
    return median(abs(point.error) for point in points)


def worst_error(points: Collection[Point]) -> Point:
    """The point that the simulation is furthest from."""
    return max(points, key=lambda point: abs(point.error))
