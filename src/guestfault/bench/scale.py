"""The published tables beside the simulated ones, and a machine's own prediction, as text."""

from __future__ import annotations

from collections.abc import Sequence

from guestfault.bench.prediction import TAKEN_OVER
from guestfault.scale.compare import FITTED_AT, Point, compare, median_error, worst_error
from guestfault.scale.costs import PUBLISHED_MACHINE, Costs
from guestfault.scale.model import Way, pages_per_second
from guestfault.scale.published import TABLES, VCPUS, Layout

__all__ = ["comparison", "predicted", "prediction"]


def comparison(points: Sequence[Point] | None = None) -> str:
    """Both tables, point by point, and how well the simulation does on each kind of point."""
    points = list(compare(PUBLISHED_MACHINE)) if points is None else points
    lines = []
    for table in TABLES:
        unit = "per vCPU" if table.per_vcpu else "whole VM"
        lines += [
            f"{table.layout.value}; thousand pages/s, {unit}",
            f"(https://lore.kernel.org/kvm/{table.source}/)",
            f"{'':6}{'userfaultfd':^30}{'exits':^30}",
            f"{'vCPUs':>6}" + f"{'published':>11}{'simulated':>11}{'':8}" * 2,
        ]
        for n in VCPUS:
            row = f"{n:6}"
            for way in (Way.UFFD, Way.EXITS):
                (p,) = (p for p in points if p.table is table and p.vcpus == n and p.way is way)
                row += f"{p.published:11}{p.simulated:11.1f}{p.error:+7.0%} "
            lines.append((row + ("" if n in FITTED_AT else "   judged")).rstrip())
        lines.append("")
    fitted = ", ".join(map(str, FITTED_AT))
    lines.append(f"fitted at {fitted} vCPUs; the others were not looked at, and judge it")
    for name, some in (
        ("fitted", [p for p in points if p.fitted]),
        ("judged", [p for p in points if not p.fitted]),
        ("all", points),
    ):
        worst = worst_error(some)
        lines.append(
            f"{name:7} median error {median_error(some):5.1%}, worst {worst.error:+.0%}"
            f" ({worst.way.value}, {worst.vcpus} vCPUs)"
        )
    return "\n".join(lines)


def predicted(costs: Costs, way: Way, layout: Layout) -> list[tuple[int, float]]:
    """Pages per second of the whole VM at each of the published numbers of vCPUs."""
    return [(n, pages_per_second(costs, n, way, layout)) for n in VCPUS]


def prediction(costs: Costs, layout: Layout, measured: dict[tuple[str, int], float]) -> str:
    """What a machine with these costs would do, beside what it was measured to do."""
    lines = [
        f"this machine, predicted: pages/s, whole VM; {layout.value}",
        f"{'vCPUs':>6}{'userfaultfd':>14}{'exits':>12}{'exits over uffd':>17}",
    ]
    uffd, exits = (predicted(costs, way, layout) for way in (Way.UFFD, Way.EXITS))
    for (n, slow), (_, fast) in zip(uffd, exits, strict=True):
        known = [
            f"{way} {measured[way, n]:.0f}" for way in ("uffd", "exit") if (way, n) in measured
        ]
        note = f"   measured: {', '.join(known)}" if known else ""
        lines.append(f"{n:6}{slow:14.0f}{fast:12.0f}{fast / slow:17.2f}{note}")
    lines += [
        "",
        "measured here: what a fault takes alone, and what it takes more beside one other vCPU;",
        "taken over from the published machine: " + ", ".join(TAKEN_OVER),
        "(so many vCPUs need as many processors, which this machine may not have)",
    ]
    return "\n".join(lines)
