from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from guestfault.dialect.record import Dialect
from guestfault.explore import search as search_module
from guestfault.explore.jobs import do_searches
from guestfault.explore.scenario import Scenario
from guestfault.explore.schedule import WorldDefect
from guestfault.explore.search import Bound, Search
from guestfault.explore.table import Cell, cell_of

MakeSearches = Callable[[], list[Search]]


@pytest.fixture
def searches(program: Callable[..., Scenario], dialect: Dialect) -> MakeSearches:
    """Several searches, some of more than one part per round."""

    def make() -> list[Search]:
        made = []
        for n in range(1, 4):
            threads = [[("read", 0, 0), ("write", i % 2, 1)] * n for i in range(3)]
            made.append(Search(program(*threads, name=f"n{n}"), dialect, Bound(2)))
        return made

    return make


@pytest.mark.timeout(60)
@pytest.mark.parametrize("part_size", [3, 40, 400])
def test_the_result_is_the_same_with_any_number_of_jobs(
    searches: MakeSearches, monkeypatch: pytest.MonkeyPatch, part_size: int
) -> None:
    """All of it: verdicts, counts, and the replay strings."""
    monkeypatch.setattr(search_module, "PART_SIZE", part_size)
    tables: list[list[Cell]] = []
    for jobs in (1, 2, 5):
        made = searches()
        rounds: list[Search] = []
        do_searches(made, jobs, rounds.append)
        assert all(search.done for search in made)
        assert {id(search) for search in rounds} == {id(search) for search in made}
        tables.append([cell_of(search) for search in made])
    assert tables[0] == tables[1] == tables[2]


@pytest.mark.timeout(60)
def test_a_limit_gives_the_same_too(
    searches: MakeSearches,
    program: Callable[..., Scenario],
    dialect: Dialect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(search_module, "PART_SIZE", 5)
    threads = [[("read", 0, 0), ("write", i % 2, 1)] * 3 for i in range(3)]
    cells = []
    for jobs in (1, 3):
        search = Search(program(*threads), dialect, Bound(3, schedules=60))
        do_searches([search], jobs)
        assert search.stopped == "limit of 60 schedules"
        assert search.tally.schedules < 75
        cells.append(cell_of(search))
    assert cells[0] == cells[1]


@pytest.mark.timeout(60)
def test_a_defect_in_a_worker_is_raised_here(dialect: Dialect) -> None:
    def build(_: Dialect) -> None:
        raise ZeroDivisionError("in the worker")

    broken = Scenario("broken", "", "", build)  # type: ignore[arg-type]
    with pytest.raises(WorldDefect, match="ZeroDivisionError: in the worker"):
        do_searches([Search(broken, dialect, Bound(0))], 2)


@pytest.mark.timeout(60)
def test_a_worker_that_is_killed_is_said_to_be(dialect: Dialect) -> None:
    def build(_: Dialect) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    deadly = Scenario("deadly", "", "", build)  # type: ignore[arg-type]
    with pytest.raises(WorldDefect, match="its worker ended with -9"):
        do_searches([Search(deadly, dialect, Bound(0))], 2)


SLOW = """
import os
import time
from guestfault.dialect.published import DIALECTS
from guestfault.explore.jobs import do_searches
from guestfault.explore.scenario import Scenario
from guestfault.explore.search import Bound, Search

def build(dialect):
    os.write(1, b"%d\\n" % os.getpid())
    time.sleep(100)

scenario = Scenario("slow", "", "", build)
do_searches([Search(scenario, DIALECTS["seed"], Bound(0)) for _ in range(2)], 2)
"""


@pytest.mark.timeout(60)
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_workers_end_with_their_parent(how: signal.Signals) -> None:
    """However it ends, no process is left that nobody waits for."""
    parent = subprocess.Popen(
        [sys.executable, "-c", SLOW], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL
    )
    with parent:
        assert parent.stdout is not None
        workers = [int(parent.stdout.readline()) for _ in range(2)]
        parent.send_signal(how)
    deadline = time.monotonic() + 10
    while any(_runs(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not any(_runs(pid) for pid in workers)


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
