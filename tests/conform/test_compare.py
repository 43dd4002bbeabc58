"""Two results, two tables, and what differs; the reasons that explain a difference."""

from __future__ import annotations

import pytest

from guestfault.conform.case import CASES
from guestfault.conform.compare import against, compare, differences
from guestfault.conform.differential import (
    Explanation,
    disagreements,
    explanations,
    matching_soft,
)
from guestfault.conform.document import Column, Document, Outcomes
from guestfault.conform.record import Exit, Phase, Result
from guestfault.conform.text import as_differences, as_disagreements, as_table

CASE = "prot-none/read/cpl3"


def result(word: str = "bare", gpa: str = "0x9000", case: str = CASE) -> Result:
    exit_ = Exit(-14, "EFAULT", 0, word, {"gpa": gpa}, [], "access")
    return Result(case, word, [Phase("access", [exit_])], "right")


def column(name: str, *results: Result, **about: str) -> Column:
    return Column(name, about, {r.case: Outcomes.of([r]) for r in results})


def test_equal_results_do_not_differ() -> None:
    assert differences(result(), result()) == []


def test_a_difference_has_a_path() -> None:
    found = differences(result(), result(gpa="0x8000"))
    assert [(d.path, d.left, d.right) for d in found] == [
        ("access/0/payload/gpa", "0x9000", "0x8000")
    ]


def test_a_phase_that_one_has_not_is_a_difference() -> None:
    more = result()
    more.phases.append(Phase("again"))
    assert [d.path for d in differences(result(), more)] == ["again/blocked"]


def test_two_lone_columns_are_compared_whatever_they_are_called() -> None:
    before = Document([column("lab:/old/bzImage", result())])
    after = Document([column("lab:/new/bzImage", result("annotated"))])
    [(old, new, found)] = against(before, after)
    assert [d.case for d in found] == [CASE]
    assert f"{CASE}: bare -> annotated" in as_differences(old, new, found)


def test_columns_are_compared_by_name() -> None:
    before = Document([column("a", result()), column("b", result("MMIO"))])
    after = Document([column("b", result()), column("c", result())])
    [(old, new, found)] = against(before, after)
    assert (old.name, new.name, len(found)) == ("b", "b", 1)


def test_a_case_that_runs_on_one_side_only_differs() -> None:
    skipped = Result(CASE, "skipped", why="no userfaultfd")
    [(_, _, found)] = against(Document([column("a", result())]), Document([column("a", skipped)]))
    assert len(found) == 1
    assert compare(column("a", result()), column("a", skipped)) == []


def test_what_flaps_in_the_same_way_agrees() -> None:
    both = [result(), result("MMIO")]
    one = Column("a", {}, {CASE: Outcomes.of([*both, both[0]])})
    other = Column("b", {}, {CASE: Outcomes.of([*both, both[1]])})
    assert compare(one, other) == []
    assert len(compare(one, column("c", result()))) == 1


@pytest.mark.parametrize(
    ("about", "name"),
    [
        ({"kernel": "6.18.44-fc", "tdp": "no"}, "soft:linux-7.3,npt=0"),
        ({"kernel": "6.17.1", "tdp": "no"}, "soft:linux-6.8,npt=0"),
        ({"kernel": "6.12.95+deb12-cloud-amd64", "tdp": "yes"}, "soft:linux-6.8"),
        ({"kernel": "7.3.4", "tdp": "yes"}, "soft:linux-7.3"),
        ({"kernel": "6.1.0", "tdp": "yes"}, None),
        ({"dialect": "seed"}, None),
    ],
)
def test_the_dialect_that_claims_to_be_like_a_kernel(
    about: dict[str, str], name: str | None
) -> None:
    found = matching_soft(about)
    assert (found and found.name) == name


def test_a_disagreement_without_a_reason_is_shown_with_its_fields() -> None:
    soft, real = column("soft", result()), column("lab:9.9", result("MMIO"), kernel="9.9")
    [found] = disagreements(soft, real)
    assert found.explained == ()
    assert set(found.open_fields) == {"word", "access/0/word"}
    text = as_disagreements(soft, real, [found])
    assert f"! {CASE}: soft bare, lab:9.9 MMIO" in text


def test_a_reason_covers_its_kvm_its_cases_and_its_fields() -> None:
    reason = Explanation("r", "module=kvm_pvm,tdp=no", ("*/cpl0",), ("*/union",), "why")
    pvm = {"module": "kvm_pvm", "tdp": "no"}
    assert reason.covers("x/read/cpl0", "access/0/union", pvm)
    assert not reason.covers("x/read/cpl3", "access/0/union", pvm)
    assert not reason.covers("x/read/cpl0", "word", pvm)
    assert not reason.covers("x/read/cpl0", "access/0/union", pvm | {"module": "kvm_amd"})
    assert not reason.covers("x/read/cpl0", "access/0/union", {})


def test_every_reason_has_a_name_of_its_own_and_is_about_some_case() -> None:
    names = [e.name for e in explanations()]
    assert len(set(names)) == len(names)
    for explanation in explanations():
        assert explanation.why.endswith(".")
        assert any(
            explanation.covers(
                case, path, dict(f.split("=") for f in explanation.kvm.split(",") if f)
            )
            for case in CASES
            for path in ("word", *(f.replace("*", "access/0") for f in explanation.fields))
        )


def test_modes_that_are_alike_share_a_row() -> None:
    cases = [f"unmapped/read/{mode}" for mode in ("cpl3", "cpl0", "real")]
    one = column("one", *(result(case=case) for case in cases))
    other = column("other", *(result("MMIO" if "real" in c else "bare", case=c) for c in cases))
    rows = as_table(Document([one, other])).splitlines()[1:3]
    assert [row.split() for row in rows] == [
        ["unmapped/read/cpl3,cpl0", "bare", "bare"],
        ["!", "unmapped/read/real", "bare", "MMIO"],
    ]
    assert len(as_table(Document([one, other]), differing=True).splitlines()) + 1 == len(
        as_table(Document([one, other])).splitlines()
    )
