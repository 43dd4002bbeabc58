"""What each dialect makes of each scenario: the worst verdict over all schedules, with its numbers.

A cell says how many schedules were run and up to how many preemptions *all* of them were, and for
each kind of verdict that occurred, the shortest schedule that comes to it, as a replay string: the
one with the fewest preemptions, and among those with the fewest steps.
"""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from guestfault.explore.replay import record, replay_string
from guestfault.explore.scenario import Kind, Scenario
from guestfault.explore.search import Search
from guestfault.explore.tally import worst_first

__all__ = ["Cell", "Shortest", "Table", "as_json", "as_text", "cell_of", "not_asked"]

# Bumped when a field of the JSON changes its meaning or goes away; new fields may come at any time.
SCHEMA = 1

_SHORT = {
    Kind.CORRECT: "correct",
    Kind.BARE: "bare",
    Kind.WARNED: "warned",
    Kind.LOST: "LOST",
    Kind.WRONG: "WRONG",
    Kind.CORRUPTED: "CORRUPT",
    Kind.STUCK: "STUCK",
    Kind.MEMORY: "MEMORY",
}
_GOOD = (Kind.CORRECT, Kind.BARE)


@dataclass(frozen=True, slots=True)
class Shortest:
    """The shortest schedule that comes to a kind of verdict, of ``count`` that do."""

    kind: Kind
    count: int
    text: str
    preemptions: int
    steps: int
    replay: str


@dataclass(frozen=True, slots=True)
class Cell:
    """One scenario under one dialect; ``not_asked`` says why if the question does not arise."""

    scenario: str
    dialect: str
    not_asked: str | None
    found: tuple[Shortest, ...] = ()  # worst first
    schedules: int = 0
    completed: int = 0
    cut: int = 0
    skipped: int = 0
    steps: int = 0
    states: int = 0
    bound: int = 0
    exhausted: int = -1
    beyond: bool = False
    stopped: str | None = None

    @property
    def worst(self) -> Kind | None:
        """The worst that happened; ``None`` where nothing was run."""
        return self.found[0].kind if self.found else None

    @property
    def extent(self) -> str:
        """How much was tried, in words."""
        tried = f"{self.schedules:,} schedule{'s' if self.schedules != 1 else ''}"
        if self.stopped is not None:
            through = (
                f", all with up to {self.exhausted}"
                if self.exhausted > 0
                else ", all with none"
                if self.exhausted == 0
                else ""
            )
            return f"{tried}, not exhausted ({self.stopped}; bound {self.bound}{through})"
        if not self.beyond:
            return f"{tried}, exhausted: there are no others"
        plural = "s" if self.bound != 1 else ""
        return f"{tried}, exhausted up to {self.bound} preemption{plural}"


@dataclass(frozen=True, slots=True)
class Table:
    """All cells, scenario by scenario."""

    scenarios: tuple[Scenario, ...]
    dialects: tuple[str, ...]
    cells: tuple[Cell, ...]

    def cell(self, scenario: str, dialect: str) -> Cell:
        """The cell of this name."""
        return next(c for c in self.cells if c.scenario == scenario and c.dialect == dialect)


def not_asked(scenario: str, dialect: str, why: str) -> Cell:
    """The cell of a question that does not arise in a dialect."""
    return Cell(scenario, dialect, why)


def cell_of(search: Search) -> Cell:
    """What a search that is done has found; runs each counterexample once more for its string."""
    tally = search.tally
    found = []
    for kind in worst_first(tally.counts):
        example = tally.examples[kind]
        trace = record(search.scenario, search.dialect, example.deviations, search.bound.limits)
        found.append(
            Shortest(
                kind,
                tally.counts[kind],
                example.text,
                example.preemptions,
                example.steps,
                replay_string(trace),
            )
        )
    return Cell(
        search.scenario.name,
        search.dialect.name,
        None,
        tuple(found),
        tally.schedules,
        tally.completed,
        tally.cut,
        tally.skipped,
        tally.steps,
        search.explored,
        search.bound.preemptions,
        search.exhausted,
        search.beyond,
        search.stopped,
    )


def as_json(table: Table) -> str:
    """The table as one JSON object; ``docs/explore.md`` describes its fields."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "scenarios": [
            {"name": s.name, "title": s.title, "source": s.source} for s in table.scenarios
        ],
        "dialects": list(table.dialects),
        "cells": [_fields(cell) for cell in table.cells],
    }
    return json.dumps(document, indent=2)


def _fields(cell: Cell) -> dict[str, Any]:
    if cell.not_asked is not None:
        return {
            "scenario": cell.scenario,
            "dialect": cell.dialect,
            "not_asked": cell.not_asked,
        }
    assert cell.worst is not None
    return {
        "scenario": cell.scenario,
        "dialect": cell.dialect,
        "verdict": cell.worst.value,
        "found": [
            {
                "verdict": shortest.kind.value,
                "schedules": shortest.count,
                "text": shortest.text,
                "preemptions": shortest.preemptions,
                "steps": shortest.steps,
                "replay": shortest.replay,
            }
            for shortest in cell.found
        ],
        "schedules": cell.schedules,
        "completed": cell.completed,
        "cut": cell.cut,
        "skipped": cell.skipped,
        "steps": cell.steps,
        "states": cell.states,
        "bound": cell.bound,
        "exhausted": cell.exhausted,
        "beyond": cell.beyond,
        "stopped": cell.stopped,
    }


def as_text(table: Table, width: int = 110) -> str:
    """The table as text of ``width`` columns: the verdicts at a glance, then each cell."""
    return "\n".join([*_glance(table, width), "", *_in_full(table, width)]) + "\n"


def _glance(table: Table, width: int) -> Iterator[str]:
    """Scenarios in rows, dialects in columns, as many at a time as there is room for."""
    first = max((len(s.name) for s in table.scenarios), default=0)
    column = max(7, *(len(name) + 1 for name in table.dialects)) if table.dialects else 7
    at_once = max(1, (width - first) // (column + 1))
    for i in range(0, len(table.dialects), at_once):
        dialects = table.dialects[i : i + at_once]
        if i:
            yield ""
        yield _row("", first, dialects, column)
        for scenario in table.scenarios:
            cells = [_short(table.cell(scenario.name, dialect)) for dialect in dialects]
            yield _row(scenario.name, first, cells, column)
    marks = []
    if any(cell.worst is None for cell in table.cells):
        marks.append("- the question does not arise")
    if any(cell.stopped for cell in table.cells):
        marks.append("* not all schedules up to the bound were tried")
    yield from textwrap.wrap("; ".join(marks), width)


def _row(name: str, first: int, cells: Sequence[str], column: int) -> str:
    return f"{name:{first}} {' '.join(f'{cell:{column}}' for cell in cells)}".rstrip()


def _short(cell: Cell) -> str:
    if cell.worst is None:
        return "-"
    return _SHORT[cell.worst] + ("*" if cell.stopped is not None else "")


def _in_full(table: Table, width: int) -> Iterator[str]:
    name = max((len(name) for name in table.dialects), default=0)
    for scenario in table.scenarios:
        yield from textwrap.wrap(
            f"{scenario.name}: {scenario.title}", width, subsequent_indent="  "
        )
        for dialect in table.dialects:
            cell = table.cell(scenario.name, dialect)
            indent = " " * (name + 4)
            if cell.worst is None:
                yield from textwrap.wrap(
                    f"  {dialect:{name}}  -: {cell.not_asked}", width, subsequent_indent=indent
                )
                continue
            yield from textwrap.wrap(
                f"  {dialect:{name}}  {cell.worst.value}: {cell.extent}",
                width,
                subsequent_indent=indent,
            )
            for shortest in cell.found:
                if shortest.kind in _GOOD:
                    continue
                said = f"{shortest.kind.value}: " if shortest.kind is not cell.worst else ""
                yield from textwrap.wrap(
                    f"{indent}{said}{shortest.text}", width, subsequent_indent=indent + "  "
                )
                # Not wrapped: it is to be copied.
                yield f"{indent}--replay {shortest.replay}"
        yield ""
