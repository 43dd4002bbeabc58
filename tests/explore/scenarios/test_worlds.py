"""The worlds: each runs under each dialect, and each can come to a bad end."""

from __future__ import annotations

import errno
from dataclasses import replace

import pytest

from guestfault.dialect.published import DIALECTS
from guestfault.dialect.record import Reset
from guestfault.explore.scenario import Kind, Scenario
from guestfault.explore.scenarios import SCENARIOS
from guestfault.explore.search import Bound, explore
from guestfault.memory.view import Registered
from guestfault.softkvm.second_stage import SecondStage

pytestmark = [pytest.mark.timeout(120), pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("name", SCENARIOS)
def test_runs_under_every_dialect(name):
    """Without preemptions: nothing raises, and a good cell has no bad schedule here."""
    scenario = SCENARIOS[name]
    for dialect in DIALECTS.values():
        if scenario.applies(dialect) is None:
            search = explore(scenario, dialect, Bound(0, schedules=200))
            assert search.tally.completed


def found(scenario: Scenario, dialect, preemptions: int = 1) -> set[Kind]:
    return set(explore(scenario, dialect, Bound(preemptions)).tally.counts)


def test_a_fault_without_the_stale_check_is_found(monkeypatch):
    """Defends: a fault that began before an invalidation installs nothing (mmu_invalidate_seq)."""
    assert found(SCENARIOS["invalidation"], DIALECTS["seed"]) == {Kind.CORRECT}
    monkeypatch.setattr(SecondStage, "mmu_invalidate_retry", lambda *_: False)
    assert Kind.MEMORY in found(SCENARIOS["invalidation"], DIALECTS["seed"])


def test_a_resolver_that_does_not_wake_on_eexist_is_found(monkeypatch):
    """Defends: who sleeps in a page that another has let in is woken (Registered.bring_in)."""
    assert found(SCENARIOS["third-sleeper"], DIALECTS["v7"]) == {Kind.CORRECT}

    def bring_in(self, offset: int, size: int) -> None:
        address = self._ram.guest.address + offset
        assert self.uffd.continue_(address, size).errno in (0, errno.EEXIST)

    monkeypatch.setattr(Registered, "bring_in", bring_in)
    assert Kind.STUCK in found(SCENARIOS["third-sleeper"], DIALECTS["v7"])


def test_a_helper_without_its_guard_is_found():
    """Defends: nobody writes the run page of a vCPU that he has not loaded."""
    scenario = SCENARIOS["vcpu-not-loaded"]
    assert found(scenario, DIALECTS["seed"]) == {Kind.WARNED}
    assert Kind.CORRUPTED in found(scenario, replace(DIALECTS["seed"], guards=()))


def test_an_exit_reason_that_is_not_reset_is_found():
    """Defends: an exit does not outlive its KVM_RUN."""
    scenario, dialect = SCENARIOS["stale-exit-reason"], DIALECTS["userfault-v3"]
    assert found(scenario, dialect) == {Kind.BARE, Kind.CORRECT}
    assert Kind.WRONG in found(scenario, replace(dialect, reset=Reset.NEVER))
