#!/usr/bin/env python3
"""Writes the table and the schedules of docs/answer.md anew: ``scripts/answer.py [JSON...]``.

Each JSON is what one of :data:`RUNS` prints, in their order; without them these are run first.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "answer.md"
EXPLORE = ["guestfault", "explore", "--json", "--jobs", "2", "--preemptions"]
RUNS = (
    [*EXPLORE, "1"],
    # What takes a second preemption to go wrong.
    [*EXPLORE, "2", "--limit", "12000", "suppressed-then-lost", "--dialect", "userfault-v3"],
)
TABLE = re.compile(r"(<!-- table:[^\n]*-->\n).*?(<!-- end of table -->)", re.DOTALL)
SCHEDULE = re.compile(r"`([a-z-]+)/([\w.-]+)/[^`]*`(\s+)\(([^)]+)\)")


def main() -> int:
    """Explore, and rewrite the page."""
    texts = [Path(name).read_text() for name in sys.argv[1:]] or [
        subprocess.run(run, check=True, stdout=subprocess.PIPE, text=True).stdout for run in RUNS
    ]
    explored, *more = [json.loads(text) for text in texts]
    cells = {
        (cell["scenario"], cell["dialect"]): cell
        for part in (explored, *more)
        for cell in part["cells"]
    }
    page = PAGE.read_text()
    page = TABLE.sub(lambda m: m[1] + table(explored, cells) + m[2], page)
    PAGE.write_text(SCHEDULE.sub(lambda m: schedule(m, cells), page))
    return 0


def table(explored: dict[str, Any], cells: dict[tuple[str, str], dict[str, Any]]) -> str:
    """One column per group of versions that agree everywhere, one line per scenario."""
    scenarios = [scenario["name"] for scenario in explored["scenarios"]]
    columns: dict[tuple[str, ...], list[str]] = {}
    for dialect in explored["dialects"]:
        verdicts = tuple(cells[name, dialect].get("verdict", "-") for name in scenarios)
        columns.setdefault(verdicts, []).append(dialect)
    lines = [
        "| | " + " | ".join(", ".join(names) for names in columns.values()) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for i, name in enumerate(scenarios):
        lines.append(f"| {name} | " + " | ".join(verdicts[i] for verdicts in columns) + " |")
    searched = [cell for cell in explored["cells"] if "verdict" in cell]
    schedules = sum(cell["schedules"] for cell in searched)
    assert all(cell["exhausted"] or not cell["beyond"] for cell in searched), "raise the limit"
    lines += [
        "",
        f"{schedules:,} schedules in {len(searched)} cells, each exhausted:",
        "with up to one preemption no other order of events is left to try.",
    ]
    return "\n".join(lines) + "\n"


def schedule(match: re.Match[str], cells: dict[tuple[str, str], dict[str, Any]]) -> str:
    """The shortest schedule of the verdict that the page states."""
    scenario, dialect, gap, verdict = match.groups()
    wanted = " ".join(verdict.split())
    for found in cells[scenario, dialect].get("found", []):
        if found["verdict"] == wanted:
            return f"`{found['replay']}`{gap}({verdict})"
    raise SystemExit(f"answer.py: {scenario} under {dialect} is never {wanted!r}: change the page")


if __name__ == "__main__":
    sys.exit(main())
