"""How many schedules a second `guestfault explore` tries.

Run it from the repository, on a machine with nothing else to do::

    PYTHONPATH=src .venv/bin/python benchmarks/explore.py [SCENARIO ...] [--seconds S]

For each scenario the search is repeated for some seconds on one core, under one dialect and with
two preemptions.  ``run`` are the schedules that were run, from a new world to their end or to a
state that was known; ``decided`` counts besides those whose next step was known to lead to such a
state, so that they need not be run.  ``engine`` is a world that does nothing but meet points, three
threads of thirty: what the scheduler and the search themselves cost.

Then all dialects are explored with one preemption, by the command itself, with one process and with
two: for the time that it takes, and the same table from both.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time

from guestfault.dialect.published import DIALECTS
from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Kind, Scenario, Verdict
from guestfault.explore.scenarios import SCENARIOS
from guestfault.explore.search import Bound, explore
from guestfault.softkvm.preempt import preemption_point

DIALECT = "seed"
PROGRAM = "import sys; from guestfault.cli.main import main; sys.exit(main())"
COMMAND = (sys.executable, "-c", PROGRAM, "explore")


class Engine:
    """Threads that add to shared cells, and nothing of a kernel."""

    def __init__(self, _: Dialect) -> None:
        self.cells = [0, 0, 0]
        self.actors = {f"thread {i}": self.act for i in range(3)}

    def act(self) -> None:
        """What each thread does."""
        for i in range(15):
            preemption_point("read", ("cell", i % 3))
            value = self.cells[i % 3]
            preemption_point("write", ("cell", i % 3), True)
            self.cells[i % 3] = value + 1

    def verdict(self, *, stuck: str | None) -> Verdict:
        """Anything will do."""
        return Verdict(Kind.CORRECT)

    def close(self) -> None:
        """Nothing to release."""


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("scenario", nargs="*", default=[*SCENARIOS])
    parser.add_argument("--seconds", type=float, default=2.0)
    args = parser.parse_args()
    print(f"dialect {DIALECT}, 2 preemptions; per second of processor time")
    print(f"{'':24}{'actors':>7}{'steps':>7}{'run/s':>10}{'decided/s':>11}{'steps/s':>11}")
    one_core(Scenario("engine", "", "", Engine), args.seconds)
    for name in args.scenario:
        if SCENARIOS[name].applies(DIALECTS[DIALECT]) is None:
            one_core(SCENARIOS[name], args.seconds)
    print()
    compare_jobs(args.scenario)


def one_core(scenario: Scenario, seconds: float) -> None:
    """Search again and again."""
    dialect = DIALECTS[DIALECT]
    world = scenario.build(dialect)
    actors = len(world.actors)
    world.close()
    run = decided = steps = 0
    began = time.process_time()
    while (spent := time.process_time() - began) < seconds:
        tally = explore(scenario, dialect, Bound(2, seconds=seconds)).tally
        run += tally.schedules
        decided += tally.schedules + tally.skipped
        steps += tally.steps
    print(
        f"{scenario.name:24}{actors:7}{steps / run:7.0f}{run / spent:10,.0f}"
        f"{decided / spent:11,.0f}{steps / spent:11,.0f}"
    )


def compare_jobs(names: list[str]) -> None:
    """Explore all of it with one process and with two, as the command does."""
    took, tables = {}, []
    for jobs in (1, 2):
        command = [*COMMAND, "--json", "--preemptions", "1", "--jobs", str(jobs), *names]
        began = time.monotonic()
        tables.append(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
        took[jobs] = time.monotonic() - began
        cells = [cell for cell in json.loads(tables[-1])["cells"] if "verdict" in cell]
        schedules = sum(cell["schedules"] for cell in cells)
        print(
            f"--jobs {jobs}: {len(cells)} cells, {schedules:,} schedules in {took[jobs]:.1f} s,"
            f" {schedules / took[jobs]:,.0f} per second"
        )
    which = "the same table" if tables[0] == tables[1] else "ANOTHER TABLE"
    print(f"--jobs 2 is {took[1] / took[2]:.2f} times as fast: {which}")


if __name__ == "__main__":
    main()
