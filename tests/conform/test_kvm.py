"""This machine's KVM: the table is the same twice, and differs from the software KVM's with reason.

What it does, a page of the documentation says; here it is held against what nobody may do.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from guestfault.conform.case import matching
from guestfault.conform.differential import disagreements, matching_soft
from guestfault.conform.document import Column, Outcomes
from guestfault.conform.run import run_cases
from guestfault.conform.target import Target, about, open_system
from guestfault.conform.text import as_disagreements
from guestfault.errors import Unavailable
from guestfault.kvm.protocols import System

KVM = Target("kvm")


@pytest.fixture
def system() -> Iterator[System]:
    try:
        system = open_system(KVM)
    except Unavailable as why:
        pytest.skip(f"needs /dev/kvm: {why}")
    yield system
    system.close()


def ask(system: System, target: Target, *patterns: str, repeat: int = 1) -> Column:
    found = run_cases(system, matching(patterns), repeat=repeat)
    outcomes = {name: Outcomes.of(results) for name, results in found.items()}
    return Column(target.name, about(target), outcomes)


@pytest.mark.timeout(180)
def test_nothing_differs_from_the_software_kvm_without_a_reason(system: System) -> None:
    soft = matching_soft(about(KVM))
    if soft is None:
        pytest.skip("no dialect of the software KVM claims to be like this kernel")
    real = ask(system, KVM)
    other = open_system(soft)
    expected = ask(other, soft)
    other.close()
    found = disagreements(expected, real)
    assert not any(d.open_fields for d in found), as_disagreements(expected, real, found)


@pytest.mark.timeout(120)
def test_the_same_three_times(system: System) -> None:
    column = ask(system, KVM, "*/read", "*/write/cpl3", "*/event", "*/ins", repeat=3)
    assert [name for name, outcomes in column.cases.items() if outcomes.flaps] == []


@pytest.mark.timeout(60)
def test_normal_accesses_succeed(system: System) -> None:
    column = ask(system, KVM, "normal")
    words = {name: outcomes.word for name, outcomes in column.cases.items()}
    assert {word for name, word in words.items() if name != "normal/prefault"} == {"completes"}


@pytest.mark.timeout(60)
def test_broken_memory_is_met_in_a_child_and_leaves_this_process_alone(system: System) -> None:
    column = ask(system, KVM, "uffd-poison/read/cpl3")
    result = column.cases["uffd-poison/read/cpl3"].first
    assert result.word == "skipped" or set(result.signals) == {"SIGBUS"}
