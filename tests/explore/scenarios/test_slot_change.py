"""A slot goes while a vCPU faults in it: by schedules written down here, and in every order."""

from __future__ import annotations

import pytest

from guestfault.dialect.published import DIALECTS
from guestfault.explore.scenario import Kind
from guestfault.explore.scenarios import SCENARIOS
from guestfault.explore.search import Bound, explore
from guestfault.softkvm import set_memslot

from .conftest import END

pytestmark = pytest.mark.timeout(60)

# The vCPU has found the slot and not yet looked for its page; the VMM deletes it and unmaps.
IN_FLIGHT = [("vcpu0", "get_user_page_fast_only"), ("vmm", END)]


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_order_is_right(dialect):
    """Invariant: once KVM_SET_USER_MEMORY_REGION has returned, nobody uses the old slot's hva."""
    search = explore(SCENARIOS["slot-deleted"], DIALECTS[dialect], Bound(2))
    assert set(search.tally.counts) == {Kind.CORRECT}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_fault_that_found_the_slot_is_waited_for(play, dialect):
    """Invariant: what userspace decodes is what failed, and lies in a slot."""
    verdict = play("slot-deleted", dialect, IN_FLIGHT)
    assert verdict.kind is Kind.CORRECT, verdict


@pytest.mark.parametrize("dialect", DIALECTS)
def test_nobody_waiting_is_found(play, dialect, monkeypatch):
    """Without synchronize_srcu() the same schedule fails on memory that userspace has unmapped."""
    monkeypatch.setattr(set_memslot, "synchronize_srcu", lambda _kvm: None)
    verdict = play("slot-deleted", dialect, IN_FLIGHT)
    assert verdict.kind is Kind.WRONG, verdict
    assert "a fault at 0x2000, where no slot is" in verdict.text
