"""What docs/answer.md claims can be replayed: each schedule comes to the verdict beside it.

So can what docs/explore.md shows.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from guestfault.dialect.published import DIALECTS
from guestfault.explore.replay import replay
from guestfault.explore.scenarios import SCENARIOS

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "answer.md"
CLAIMS = [
    (schedule, " ".join(verdict.split()))
    for schedule, verdict in re.findall(
        r"`([a-z-]+/[\w.-]+/[^`/]+/[0-9a-f]{8})`\s+\(([^)]+)\)", PAGE.read_text()
    )
]


def test_the_page_makes_claims() -> None:
    assert len(CLAIMS) >= 15


@pytest.mark.timeout(60)
@pytest.mark.parametrize(("schedule", "verdict"), CLAIMS)
def test_a_schedule_comes_to_the_verdict_beside_it(schedule: str, verdict: str) -> None:
    assert replay(schedule, SCENARIOS, DIALECTS).verdict.kind.value == verdict, (
        f"docs/answer.md says {verdict!r}; scripts/answer.py writes the page anew"
    )


def test_the_strings_of_the_manual_replay() -> None:
    shown = set(
        re.findall(r"--replay ([a-z][\w./=-]+/[0-9a-f]{8})", (DOCS / "explore.md").read_text())
    )
    assert shown
    for schedule in shown:
        replay(schedule, SCENARIOS, DIALECTS)
