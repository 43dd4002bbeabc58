"""A part of the accuracy experiment at every run of the tests: never wrong, never missed.

All of it is ``benchmarks/locate_accuracy.py``.
"""

from __future__ import annotations

from pathlib import Path
from types import ModuleType

import pytest

from guestfault.errors import Unavailable

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import locate_accuracy

    return locate_accuracy


def test_there_are_enough_forms(accuracy: ModuleType) -> None:
    forms = {(form.bits, form.bytes) for form in accuracy.FORMS}
    assert len(forms) >= 120
    assert len({(str(form), form.group) for form in accuracy.FORMS}) == len(accuracy.FORMS)


@pytest.mark.parametrize("which", ["soft", "kvm"])
def test_never_wrong_and_never_missed(accuracy: ModuleType, which: str) -> None:
    (make,) = accuracy.open_machines(which)
    try:
        machine = make()
    except Unavailable as error:
        pytest.skip(str(error))
    try:
        # Every fifth form, and all that may be ranked or unknown.
        uncertain = {"far transfers and events", "page crossings", "AVX and AVX2"}
        forms = [
            form
            for number, form in enumerate(accuracy.FORMS)
            if number % 5 == 0 or form.group in uncertain
        ]
        tally = accuracy.experiment(machine, forms, {})
    finally:
        machine.close()
    answers = [*tally.questions, *tally.all_absent]
    assert [str(q) for q in answers if q.answer in ("wrong", "missed")] == []
    assert tally.disagreements == []
    certain = sum(q.answer == "certain" for q in tally.questions)
    assert certain > 20 if which == "kvm" else certain > 1000


def test_judging(accuracy: ModuleType) -> None:
    from guestfault.fault.access import Access, FoundBy

    def at(gpa: int | None, *, certain: bool = False) -> Access:
        return Access(gpa, 8, FoundBy.DECODE, certain=certain)

    judge = accuracy.judge
    assert judge((at(0x1008, certain=True),), 1) == ("certain", 1)
    assert judge((at(0x1008, certain=True),), 2) == ("wrong", 0)
    assert judge((at(0x1008), at(None), at(0x2000)), 2) == ("ranked", 3)
    assert judge((at(0x1008), at(None)), 2) == ("unknown", 0)
    assert judge((at(0x1008),), 2) == ("missed", 0)
