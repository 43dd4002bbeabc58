"""What a search has tried and what it came to: counts, and the shortest example of each verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from guestfault.explore.scenario import Kind, Verdict
from guestfault.explore.schedule import Deviation

__all__ = ["Example", "Tally", "worst_first"]

_SEVERITY = {kind: rank for rank, kind in enumerate(Kind)}


@dataclass(frozen=True, slots=True, order=True)
class Example:
    """A schedule that came to a verdict; the smallest has the fewest preemptions and steps."""

    preemptions: int
    steps: int
    deviations: tuple[Deviation, ...]
    text: str


@dataclass(slots=True)
class Tally:
    """What was tried, and what it came to."""

    completed: int = 0  # schedules run to their end
    cut: int = 0  # run until they came to a known state
    skipped: int = 0  # not run, for their next step leads to a known state
    steps: int = 0  # taken, those of re-execution too
    counts: dict[Kind, int] = field(default_factory=dict)
    examples: dict[Kind, Example] = field(default_factory=dict)

    @property
    def schedules(self) -> int:
        """Those that were run."""
        return self.completed + self.cut

    @property
    def worst(self) -> Kind | None:
        """The worst that was found."""
        return max(self.counts, key=_SEVERITY.__getitem__, default=None)

    def note(self, verdict: Verdict, example: Example) -> None:
        """Count a verdict; keep the example if there is no smaller one."""
        kind = verdict.kind
        self.counts[kind] = self.counts.get(kind, 0) + 1
        known = self.examples.get(kind)
        if known is None or example < known:
            self.examples[kind] = example

    def add(self, other: Tally) -> None:
        """Add what another part of the search has found."""
        self.completed += other.completed
        self.cut += other.cut
        self.skipped += other.skipped
        self.steps += other.steps
        for kind, count in other.counts.items():
            self.counts[kind] = self.counts.get(kind, 0) + count
        for kind, example in other.examples.items():
            known = self.examples.get(kind)
            if known is None or example < known:
                self.examples[kind] = example


def worst_first(kinds: Iterable[Kind]) -> list[Kind]:
    """In the order of how bad they are."""
    return sorted(kinds, key=_SEVERITY.__getitem__, reverse=True)
