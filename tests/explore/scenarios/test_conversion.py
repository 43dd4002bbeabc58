"""A page converted under a vCPU: by schedules that are written down, and by the search."""

from __future__ import annotations

import pytest

from guestfault.dialect.published import DIALECTS
from guestfault.explore.scenario import Kind
from guestfault.explore.scenarios import SCENARIOS
from guestfault.explore.search import Bound, explore
from guestfault.softkvm import mmu, private_fault
from guestfault.softkvm.mmu_internal import RetPf
from guestfault.softkvm.second_stage import SecondStage

from .conftest import END

pytestmark = pytest.mark.timeout(60)
BOTH = pytest.mark.parametrize("dialect", ["linux-6.8", "linux-7.3"])
# The fault has asked what the frame is, and not yet compared.  The VMM converts it meanwhile.
MISMATCH = [("vcpu0", "direct_page_fault: read mmu_invalidate_seq"), ("vmm", END)]


@BOTH
@pytest.mark.parametrize(
    ("scenario", "kind"), [("conversion", Kind.CORRECT), ("conversion-obeyed", Kind.MEMORY)]
)
def test_the_exit_tells_what_the_page_was(play, dialect, scenario, kind):
    """Invariant: a page is in the end what the VMM's last conversion has made it."""
    verdict = play(scenario, dialect, MISMATCH)
    assert verdict.kind is kind, verdict
    if kind is Kind.MEMORY:
        assert verdict.text == "the page at 0x2000 was made private, and is shared in the end"


@BOTH
def test_every_order_of_events(dialect):
    answered = explore(SCENARIOS["conversion"], DIALECTS[dialect], Bound(2))
    assert set(answered.tally.counts) == {Kind.CORRECT}
    obeyed = explore(SCENARIOS["conversion-obeyed"], DIALECTS[dialect], Bound(2))
    assert set(obeyed.tally.counts) == {Kind.CORRECT, Kind.MEMORY}


def found(monkeypatch: pytest.MonkeyPatch, owner: object, name: str, value: object) -> set[Kind]:
    monkeypatch.setattr(owner, name, value)
    return set(explore(SCENARIOS["conversion"], DIALECTS["linux-7.3"], Bound(1)).tally.counts)


def test_a_fault_without_the_stale_check_is_found(monkeypatch):
    """Defends: a fault that compared before a conversion installs nothing after it."""
    kinds = found(monkeypatch, SecondStage, "mmu_invalidate_retry", lambda *_: False)
    assert Kind.MEMORY in kinds


def test_a_conversion_that_zaps_nothing_is_found(monkeypatch):
    """Defends: when KVM_SET_MEMORY_ATTRIBUTES returns, nobody uses the other memory."""
    kinds = found(monkeypatch, SecondStage, "_zap", lambda *_: False)
    assert Kind.MEMORY in kinds


def test_a_fault_that_does_not_compare_is_found(monkeypatch):
    """Defends: the second look at the attribute, without which the first one decides."""

    def compare_nothing(vcpu, fault):
        gmem = private_fault.kvm_mmu_faultin_pfn_gmem
        return gmem(vcpu, fault) if fault.is_private else RetPf.INVALID

    assert Kind.MEMORY in found(monkeypatch, mmu, "faultin_pfn_of_two", compare_nothing)


# A must be waited for; the vCPU is halted.  The VMM makes A private, the worker has A.
ASYNC = [("vcpu0", END), ("vmm", END), ("worker 1 of vCPU 0", END), ("vcpu0", END)]
HAD = {"the page can be had just now, or not": [1]}


@pytest.mark.parametrize(("dialect", "kind"), [("linux-6.8", Kind.BARE), ("linux-7.3", Kind.WRONG)])
def test_a_dropped_mismatch_passes_for_the_failure_that_follows(play, dialect, kind):
    """Invariant: a bare failure stays bare.  v4's hazard (B), in what was merged.

    6.8 asks anew what the page is, and so drops no mismatch here; it takes a conversion between its
    two looks.
    """
    verdict = play("conversion-async", dialect, ASYNC, HAD)
    assert verdict.kind is kind, verdict
    if kind is Kind.WRONG:
        assert "is told of 4096 bytes at 0x2000; what failed is 0x3000" in verdict.text


def test_a_mismatch_between_the_two_looks_of_a_prefetch(play):
    """The same in 6.8, in the one order that has it."""
    moves = [
        ("vcpu0", END),
        ("worker 1 of vCPU 0", END),
        ("vcpu0", "kvm_check_async_pf_completion: take one"),
        ("vcpu0", "direct_page_fault: read mmu_invalidate_seq"),
        ("vmm", END),
        ("vcpu0", END),
    ]
    verdict = play("conversion-async", "linux-6.8", moves, HAD)
    assert verdict.kind is Kind.WRONG, verdict
