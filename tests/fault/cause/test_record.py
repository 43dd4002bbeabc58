from __future__ import annotations

from pathlib import Path

import pytest

from guestfault.fault.cause.record import Cause, Kind, Remedy

MANUAL = Path(__file__).parents[3] / "docs" / "causes.md"


@pytest.mark.parametrize("word", [*Kind, *Remedy])
def test_the_manual_has_every_kind_and_remedy(word: str) -> None:
    table = MANUAL.read_text().split("## What cannot")[0]
    assert str(word) in table


def test_a_guess_does_not_read_as_a_fact() -> None:
    sure = Cause(Kind.NO_MAPPING, "nothing is mapped at 0x1000", Remedy.MAP, "map memory there")
    guess = Cause(Kind.NO_MAPPING, "nothing is mapped at 0x1000", Remedy.MAP, certain=False)
    assert str(sure) == "nothing is mapped at 0x1000 (resolved by mmap: map memory there)"
    assert str(guess) == "possibly: nothing is mapped at 0x1000 (resolved by mmap)"


def test_what_nothing_resolves() -> None:
    cause = Cause(Kind.HWPOISON, "the page is poisoned", Remedy.NONE, "its content is lost")
    assert not cause.resolvable
    assert str(cause) == "the page is poisoned (cannot be resolved: its content is lost)"
