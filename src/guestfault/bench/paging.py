"""The demand-paging experiment: several shapes, in alternating rounds, and what came of each.

Rounds alternate, and their order turns round every time, so that a machine that grows slower while
it is measured does not make one way look worse.  What is reported is the median and how far the
runs lie apart; a mean would be the machine's other occupations.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from guestfault.bench.experiment import Engine, run_once
from guestfault.bench.shape import Run, Shape
from guestfault.kvm.protocols import System
from guestfault.paging.histogram import LatencyHistogram

__all__ = ["Summary", "as_json", "as_text", "measure"]

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True, slots=True)
class Summary:
    """All runs of one shape."""

    runs: tuple[Run, ...]

    @property
    def shape(self) -> Shape:
        """What was run."""
        return self.runs[0].shape

    @property
    def rate(self) -> float:
        """The whole VM's pages per second: the median of the runs."""
        return median(run.rate for run in self.runs)

    @property
    def rates(self) -> tuple[float, float]:
        """The least and the most of the runs."""
        return min(run.rate for run in self.runs), max(run.rate for run in self.runs)

    @property
    def latency(self) -> LatencyHistogram:
        """Of all runs together."""
        return LatencyHistogram.merge(run.latency for run in self.runs)

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        shape, latency, (least, most) = self.shape, self.latency, self.rates
        percentiles = {f"p{p}": latency.percentile(p) for p in _PERCENTILES}
        return {
            "way": shape.way.value,
            "vcpus": shape.vcpus,
            "pages_per_vcpu": shape.pages,
            "fault": shape.fault.value,
            "uffds": shape.uffds.name.lower(),
            "readers": shape.readers,
            "rate": self.rate,
            "rate_least": least,
            "rate_most": most,
            "rate_per_vcpu": median(run.rate_per_vcpu for run in self.runs),
            "cpu_seconds_per_million": median(run.cpu_per_million for run in self.runs),
            "faults": median(run.faults for run in self.runs),
            "in_python": median(run.in_python for run in self.runs),
            "elsewhere": median(run.elsewhere for run in self.runs),
            "latency_ns": percentiles | {"max": latency.max},
            "latency_histogram": [list(pair) for pair in latency.buckets()],
            "rates": [run.rate for run in self.runs],
        }


def measure(
    system: System,
    engine: Engine,
    shapes: Sequence[Shape],
    rounds: int,
    say: Callable[[str], None] = lambda _text: None,
) -> list[Summary]:
    """Run every shape ``rounds`` times; their summaries in the order of the shapes.

    One run before the first is thrown away.  Raises what
    :func:`~guestfault.bench.experiment.run_once` does.
    """
    say("warming up")
    run_once(system, shapes[0], engine)
    runs: dict[Shape, list[Run]] = {shape: [] for shape in shapes}
    for n in range(rounds):
        for shape in shapes if n % 2 == 0 else reversed(shapes):
            say(f"round {n + 1} of {rounds}: {shape.way.value}, {shape.vcpus} vCPUs")
            runs[shape].append(run_once(system, shape, engine))
    return [Summary(tuple(each)) for each in runs.values()]


def as_json(system: System, engine: Engine, summaries: Sequence[Summary]) -> dict[str, Any]:
    """Everything, for machines and for :mod:`guestfault.bench.prediction`."""
    return {
        "kvm": system.name,
        "loop": engine.name,
        "processors": os.cpu_count(),
        "results": [summary.as_json() for summary in summaries],
    }


def as_text(system: System, engine: Engine, summaries: Sequence[Summary]) -> str:
    """A table for people."""
    shape = summaries[0].shape
    size = shape.pages * 4 / 1024
    uffds = shape.uffds.value if any(s.shape.way.value == "uffd" for s in summaries) else ""
    lines = [
        f"{system.name}, {engine.name}; {size:g} MiB per vCPU, one write per page,"
        f" {shape.fault.value} faults" + (f"; {uffds}" if uffds else ""),
        "",
        f"{'':5}{'vCPUs':>5}{'pages/s':>11}{'least to most':>19}{'per vCPU':>10}{'CPU s/M':>9}"
        f"{'p50':>8}{'p99 us':>9}{'elsewhere':>11}",
    ]
    for summary in summaries:
        row = summary.as_json()
        latency = row["latency_ns"]
        spread = f"{row['rate_least']:.0f} to {row['rate_most']:.0f}"
        lines.append(
            f"{row['way']:5}{row['vcpus']:5}{row['rate']:11.0f}{spread:>19}"
            f"{row['rate_per_vcpu']:10.0f}{row['cpu_seconds_per_million']:9.1f}"
            f"{latency['p50'] / 1e3:8.1f}{latency['p99'] / 1e3:9.1f}{row['elsewhere']:11.0%}"
        )
    ways = {(s.shape.way.value, s.shape.vcpus): s.rate for s in summaries}
    ratios = [
        f"{ways['exit', n] / ways['uffd', n]:.2f} at {n}"
        for way, n in ways
        if way == "exit" and ("uffd", n) in ways
    ]
    if ratios:
        lines += ["", f"exit over uffd, by number of vCPUs: {', '.join(ratios)}"]
    if any(row.as_json()["elsewhere"] > 0.1 for row in summaries):
        lines += ["", "other processes had more than a tenth of the machine: measure again"]
    return "\n".join(lines)
