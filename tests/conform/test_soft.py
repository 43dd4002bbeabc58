"""The software KVM: every case comes out as the committed table has it, and so twice."""

from __future__ import annotations

from pathlib import Path

import pytest

from guestfault.conform.case import matching
from guestfault.conform.compare import compare
from guestfault.conform.document import Column, Document, Outcomes, load
from guestfault.conform.run import run_cases
from guestfault.conform.target import about, open_system, parse
from guestfault.conform.text import as_differences

TABLE = Path(__file__).parents[2] / "docs" / "data" / "kernels.json"


@pytest.fixture(scope="module")
def table() -> Document:
    return load(str(TABLE))


def ask(name: str, *patterns: str, repeat: int = 1) -> Column:
    target = parse(name)
    system = open_system(target)
    try:
        found = run_cases(system, matching(patterns), repeat=repeat)
    finally:
        system.close()
    outcomes = {case: Outcomes.of(results) for case, results in found.items()}
    return Column(target.name, about(target), outcomes)


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("name", "patterns"),
    [
        ("soft:linux-7.3", ()),
        ("soft:linux-7.3,npt=0", ()),
        ("soft:linux-6.8", ("*/cpl3",)),
        ("soft:linux-6.8,npt=0", ("*/cpl3",)),
        ("soft:seed", ("*/cpl3",)),
        ("soft:seed,npt=0", ("*/cpl3",)),
    ],
)
def test_every_case_is_as_the_table_has_it(
    name: str, patterns: tuple[str, ...], table: Document
) -> None:
    """After an intended change: sh scripts/kernel-table.sh soft."""
    expected = next(column for column in table.columns if column.name == name)
    found = ask(name, *patterns)
    different = compare(expected, found)
    assert not different, as_differences(expected, found, different)
    assert found.cases.keys() <= expected.cases.keys()


@pytest.mark.timeout(60)
def test_the_same_three_times() -> None:
    column = ask("soft:linux-7.3", "prot-none", "missing/read", "missing-sigbus/event", repeat=3)
    assert [name for name, outcomes in column.cases.items() if outcomes.flaps] == []


@pytest.mark.timeout(60)
def test_a_normal_access_succeeds_in_every_mode() -> None:
    column = ask("soft:seed", "normal/*/cpl?", "normal/*/real")
    assert {outcomes.word for outcomes in column.cases.values()} == {"completes"}
    assert {outcomes.first.ending for outcomes in column.cases.values()} == {"right"}


def test_what_the_software_kvm_has_not_got_is_skipped_by_name() -> None:
    column = ask("soft:seed", "gmem/read/cpl3", "normal/prefault", "private/read/cpl3", "hwpoison")
    assert {outcomes.word for outcomes in column.cases.values()} == {"skipped"}
    whys = {name: outcomes.first.why for name, outcomes in column.cases.items()}
    assert whys["gmem/read/cpl3"] == "guest_memfd: capability 234 is 0"
    assert whys["private/read/cpl3"] == "KVM_X86_SW_PROTECTED_VM: capability 235 is 0x0"
    assert "KVM_PRE_FAULT_MEMORY" in whys["normal/prefault"]
    assert "in the lab only" in whys["hwpoison/read/cpl3"]


def test_what_the_seed_annotates_and_linux_does_not() -> None:
    seed, linux = (
        ask(name, "prot-none/write/cpl3").cases["prot-none/write/cpl3"].first
        for name in ("soft:seed", "soft:linux-7.3")
    )
    assert (seed.word, linux.word) == ("annotated", "bare")
    fault = seed.phases[0].exits[0]
    assert (fault.errno, fault.payload["gpa"], fault.payload["size"]) == ("EFAULT", "0x9000", 4096)
    assert fault.union, "the description is in the union"
    assert linux.phases[0].exits[0].union == [], "nothing of the union is written"
