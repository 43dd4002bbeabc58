"""One schedule told step by step, a column for each actor.

A row is a step: its number, and in the column of the actor that took it the name of the preemption
point that it stood at.  Below it, marked with ``|``, is what the world had to say of that step
(:func:`guestfault.explore.scheduler.annotate`).
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from guestfault.explore.scenario import Verdict
from guestfault.explore.schedule import Deviation, Step

__all__ = ["Trace", "as_columns"]

_NARROWEST = 24
_GAP = 2


@dataclass(frozen=True, slots=True)
class Trace:
    """A schedule that was run and recorded, with its verdict."""

    scenario: str
    dialect: str
    deviations: tuple[Deviation, ...]
    actors: tuple[str, ...]
    steps: tuple[Step, ...]
    preemptions: int
    stuck: str | None
    verdict: Verdict


def as_columns(trace: Trace, width: int = 120) -> str:
    """The trace as text of ``width`` columns, or more where there are too many actors for that."""
    return "\n".join(_lines(trace, width)) + "\n"


def _lines(trace: Trace, width: int) -> Iterator[str]:
    number = max(4, len(str(len(trace.steps))))
    count = max(1, len(trace.actors))
    column = max(_NARROWEST, (width - number) // count - _GAP)
    yield _row("step", number, list(trace.actors), column)
    deviating = {step for step, _ in trace.deviations}
    for i, step in enumerate(trace.steps):
        # A mark where the schedule is not what the policy would have done.
        label = f"*{i}" if i in deviating else str(i)
        text = textwrap.wrap(step.name, column, subsequent_indent="  ")
        for note in step.notes:
            text += textwrap.wrap(note, column, initial_indent="| ", subsequent_indent="|   ")
        for line in text:
            yield _row(label, number, [""] * step.actor + [line], column)
            label = ""


def _row(label: str, number: int, cells: list[str], column: int) -> str:
    gap = " " * _GAP
    return f"{label:>{number}}{gap}{gap.join(f'{cell:{column}}' for cell in cells)}".rstrip()
