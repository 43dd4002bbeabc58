#!/usr/bin/env python3
"""Writes the table and the schedules of docs/answer.md anew: ``scripts/answer.py [JSON]``.

JSON is what :data:`COMMAND` prints; without it that is run first, which takes some minutes.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parents[1] / "docs" / "answer.md"
COMMAND = [
    "guestfault",
    "explore",
    "--preemptions",
    "2",
    "--limit",
    "8000",
    "--jobs",
    "2",
    "--json",
]
TABLE = re.compile(r"(<!-- table:[^\n]*-->\n).*?(<!-- end of table -->)", re.DOTALL)
SCHEDULE = re.compile(r"`([a-z-]+)/([\w.-]+)/[^`]*`(\s+)\(([^)]+)\)")


def main() -> int:
    """Explore, and rewrite the page."""
    if len(sys.argv) > 1:
        text = Path(sys.argv[1]).read_text()
    else:
        text = subprocess.run(COMMAND, check=True, stdout=subprocess.PIPE, text=True).stdout
    explored = json.loads(text)
    cells = {(cell["scenario"], cell["dialect"]): cell for cell in explored["cells"]}
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
    searched = [cell for cell in cells.values() if "verdict" in cell]
    schedules = sum(cell["schedules"] for cell in searched)
    bounds = Counter(2 if not cell["beyond"] else cell["exhausted"] for cell in searched)
    lines += [
        "",
        f"{schedules:,} schedules in {len(searched)} cells. Exhausted, so that no other order of",
        f"events is left to try: {bounds[2]} cells with up to two preemptions, and with one the other",
        f"{bounds[1]}, where the limit of 8,000 schedules came first.",
    ]
    assert bounds[2] + bounds[1] == len(searched), f"raise the limit: {bounds}"
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
