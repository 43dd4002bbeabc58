"""The list of cases: names, patterns, and that every part of it is used."""

from __future__ import annotations

import pytest

from guestfault.conform.case import CASES, CONDITIONS, matching
from guestfault.conform.guests import ACCESSES, loop
from guestfault.errors import GuestfaultError


def test_every_case_has_its_parts_in_its_name() -> None:
    for name, case in CASES.items():
        condition, _, rest = name.partition("/")
        assert case.condition.name == condition
        assert rest == "prefault" or rest.split("/")[0] == case.access.name
        assert case.title


def test_every_condition_and_every_access_is_in_some_case() -> None:
    assert {case.condition.name for case in CASES.values()} == CONDITIONS.keys()
    assert {case.access.name for case in CASES.values()} == ACCESSES.keys()


def test_no_pattern_is_all_of_them() -> None:
    assert [case.name for case in matching([])] == list(CASES)


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("prot-none/read/cpl3", ["prot-none/read/cpl3"]),
        ("unmapped/exec", ["unmapped/exec/cpl3", "unmapped/exec/cpl0", "unmapped/exec/real"]),
        ("*/ins/real", [n for n in CASES if n.endswith("/ins/real")]),
        ("missing", [n for n in CASES if n.startswith("missing/")]),
    ],
)
def test_patterns(pattern: str, found: list[str]) -> None:
    assert [case.name for case in matching([pattern])] == found


def test_cases_come_in_the_order_of_the_table_and_once() -> None:
    names = [case.name for case in matching(["unmapped", "normal/read", "normal/read/cpl3"])]
    assert names == [n for n in CASES if n.startswith(("unmapped/", "normal/read/"))]


def test_a_pattern_for_nothing_is_an_error() -> None:
    with pytest.raises(GuestfaultError, match="no case is called 'prot-nine'"):
        matching(["normal", "prot-nine"])


@pytest.mark.parametrize("name", ACCESSES)
def test_a_guest_is_a_few_bytes_around_its_access(name: str) -> None:
    access = ACCESSES[name]
    for mode in access.modes:
        code, begin, end = loop(access, mode)
        assert 0 < begin < end < len(code) < 32
