"""``guestfault explore``: every order of events, and what each published interface makes of it.

Exit status 0 when the exploration ran: a bad cell is a result, not an error.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Mapping
from typing import NoReturn, TypeVar

from guestfault.cli.arguments import positive_number
from guestfault.cli.transient import transient
from guestfault.dialect.published import DIALECTS
from guestfault.dialect.record import Dialect
from guestfault.errors import GuestfaultError
from guestfault.explore.jobs import do_searches
from guestfault.explore.replay import replay, replay_string
from guestfault.explore.scenario import Scenario
from guestfault.explore.scenarios import SCENARIOS
from guestfault.explore.search import Bound, Search
from guestfault.explore.table import Table, as_json, as_text, cell_of, not_asked
from guestfault.explore.trace import as_columns

__all__ = ["add_arguments", "main"]

_NARROWEST, _WIDEST = 100, 120
_T = TypeVar("_T")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``guestfault explore``."""
    parser.add_argument(
        "scenario", nargs="*", metavar="SCENARIO", help="what to explore (default: all)"
    )
    parser.add_argument(
        "--dialect",
        action="append",
        metavar="NAME",
        help="a version of the interface; again for several (default: all)",
    )
    parser.add_argument(
        "--preemptions",
        type=_natural,
        default=2,
        metavar="K",
        help="how often a schedule may interrupt a thread that could go on (default: 2)",
    )
    parser.add_argument(
        "--jobs", type=positive_number, default=1, metavar="N", help="processes to use (default: 1)"
    )
    parser.add_argument(
        "--limit",
        type=positive_number,
        metavar="SCHEDULES",
        help="give up on a cell after about so many schedules",
    )
    parser.add_argument(
        "--seconds",
        type=positive_number,
        metavar="S",
        help="give up on a cell after so long; what is found then depends on the machine",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--list", action="store_true", help="list the scenarios and dialects")
    parser.add_argument(
        "--replay", metavar="STRING", help="run one schedule again, and print its steps"
    )


def main(args: argparse.Namespace) -> int:
    """Do what the options say."""
    width = min(max(shutil.get_terminal_size().columns, _NARROWEST), _WIDEST)
    if args.replay is not None:
        _replay(args.replay, width)
        return 0
    scenarios = _named("scenario", SCENARIOS, args.scenario)
    dialects = _named("dialect", DIALECTS, args.dialect)
    if args.list:
        _list(scenarios, dialects)
        return 0
    bound = Bound(args.preemptions, args.limit, args.seconds)
    table = _explore(scenarios, dialects, bound, args.jobs)
    print(as_json(table) if args.json else as_text(table, width), end="\n" if args.json else "")
    return 0


def _explore(
    scenarios: Mapping[str, Scenario], dialects: Mapping[str, Dialect], bound: Bound, jobs: int
) -> Table:
    """Search each cell whose question arises."""
    searches: dict[tuple[str, str], Search] = {}
    cells = {}
    for scenario in scenarios.values():
        for dialect in dialects.values():
            where = scenario.name, dialect.name
            why = scenario.applies(dialect)
            if why is None:
                searches[where] = Search(scenario, dialect, bound)
            else:
                cells[where] = not_asked(*where, why)
    progress = _Progress(list(searches.values()))
    try:
        do_searches(progress.searches, jobs, progress.show)
    finally:
        transient("")
    for where, search in searches.items():
        cells[where] = cell_of(search)
    return Table(
        tuple(scenarios.values()),
        tuple(dialects),
        tuple(cells[s, d] for s in scenarios for d in dialects),
    )


class _Progress:
    """One line on standard error, which is written over; silent if nobody watches."""

    def __init__(self, searches: list[Search]) -> None:
        self.searches = searches

    def show(self, search: Search) -> None:
        """Say how far all searches are; ``search`` has just finished a round."""
        done = sum(s.done for s in self.searches)
        schedules = sum(s.tally.schedules for s in self.searches)
        transient(
            f"{done} of {len(self.searches)} cells, {schedules:,} schedules;"
            f" {search.scenario.name}, {search.dialect.name}"
        )


def _replay(text: str, width: int) -> None:
    trace = replay(text, SCENARIOS, DIALECTS)
    said = f": {trace.verdict.text}" if trace.verdict.text else ""
    plural = "" if trace.preemptions == 1 else "s"
    print(f"{trace.scenario}, {trace.dialect}: {SCENARIOS[trace.scenario].title}")
    print(f"{trace.verdict.kind.value}{said}")
    print(
        f"{len(trace.steps)} steps, {trace.preemptions} preemption{plural};"
        f" {replay_string(trace)}\n"
    )
    print(as_columns(trace, width), end="")


def _list(scenarios: Mapping[str, Scenario], dialects: Mapping[str, Dialect]) -> None:
    print("Scenarios")
    name = max(map(len, scenarios), default=0)
    for scenario in scenarios.values():
        print(f"  {scenario.name:{name}}  {scenario.title}")
        print(f"  {'':{name}}  {scenario.source}")
    print("Dialects")
    name = max(map(len, dialects), default=0)
    for dialect in dialects.values():
        print(f"  {dialect.name:{name}}  {dialect.source}")


def _named(what: str, known: Mapping[str, _T], wanted: list[str] | None) -> dict[str, _T]:
    """Those that were asked for, or all."""
    if not wanted:
        return dict(known)
    for name in wanted:
        if name not in known:
            _refuse(what, name, known)
    return {name: known[name] for name in wanted}


def _refuse(what: str, name: str, known: Mapping[str, object]) -> NoReturn:
    raise GuestfaultError(f"there is no {what} {name!r}; there are {', '.join(known)}")


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number
