from __future__ import annotations

import json
from collections.abc import Callable

import pytest

from guestfault.dialect.record import Dialect
from guestfault.explore.replay import replay
from guestfault.explore.scenario import Kind, Scenario
from guestfault.explore.search import Bound, explore
from guestfault.explore.table import Table, as_json, as_text, cell_of, not_asked


@pytest.fixture
def table(lost_update: Scenario, program: Callable[..., Scenario], dialect: Dialect) -> Table:
    fine = program([("write", 0, 1)], name="fine")
    long = program(*[[("read", 0, 0), ("write", 0, 1)] * 4] * 3, name="long")
    return Table(
        (lost_update, fine, long),
        ("seed", "linux-6.8"),
        (
            cell_of(explore(lost_update, dialect, Bound(1))),
            not_asked("lost-update", "linux-6.8", "there is nothing to lose"),
            cell_of(explore(fine, dialect, Bound(2))),
            not_asked("fine", "linux-6.8", "it would be"),
            cell_of(explore(long, dialect, Bound(2, schedules=10))),
            not_asked("long", "linux-6.8", "no time"),
        ),
    )


def test_a_cell_has_the_worst_verdict_and_the_shortest_way_to_each(
    table: Table, lost_update: Scenario, dialect: Dialect
) -> None:
    cell = table.cell("lost-update", "seed")
    assert cell.worst is Kind.LOST
    assert [(s.kind, s.preemptions) for s in cell.found] == [(Kind.LOST, 1), (Kind.CORRECT, 0)]
    for shortest in cell.found:
        trace = replay(shortest.replay, {"lost-update": lost_update}, {"seed": dialect})
        assert trace.verdict == (shortest.kind, shortest.text)
        assert len(trace.steps) == shortest.steps


def test_a_cell_says_how_much_was_tried(table: Table) -> None:
    extents = [cell.extent for cell in table.cells if cell.not_asked is None]
    assert extents[0].endswith("schedules, exhausted up to 1 preemption")
    assert extents[1] == "1 schedule, exhausted: there are no others"
    assert "not exhausted (limit of 10 schedules; bound 2" in extents[2]


@pytest.mark.parametrize("width", [60, 110])
def test_the_text_fits_and_says_each_replay_string_whole(table: Table, width: int) -> None:
    text = as_text(table, width)
    lines = text.splitlines()
    assert max(len(line) for line in lines if "--replay" not in line) <= width
    assert lines[1].split() == ["lost-update", "LOST", "-"]
    assert lines[3].split() == ["long", "correct*", "-"]
    assert f"--replay {table.cell('lost-update', 'seed').found[0].replay}" in text
    assert "there is nothing to lose" in text


def test_many_dialects_are_shown_some_at_a_time(table: Table) -> None:
    names = tuple(f"dialect-{i}" for i in range(20))
    cells = tuple(not_asked(s.name, name, "no") for s in table.scenarios for name in names)
    lines = as_text(Table(table.scenarios, names, cells), 100).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum("dialect-0" in line for line in lines[:10]) == 1


def test_the_json_has_a_cell_for_each_pair(table: Table) -> None:
    document = json.loads(as_json(table))
    assert document.keys() == {"schema", "scenarios", "dialects", "cells"}
    assert len(document["cells"]) == 6
    first, second = document["cells"][:2]
    assert first["verdict"] == "information lost"
    assert first["found"][0]["replay"].startswith("lost-update/seed/")
    assert second == {
        "scenario": "lost-update",
        "dialect": "linux-6.8",
        "not_asked": "there is nothing to lose",
    }
