"""Fewer faults, the same bytes: whole guests with fault-around, on every KVM and in both modes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest

from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.walk import Walk
from guestfault.memory.ram import PAGE_SIZE
from guestfault.paging import pager as pager_module
from guestfault.paging.ahead import Ahead
from guestfault.paging.around import DEFAULT_WINDOW, OFF
from guestfault.vmm.report import report
from guestfault.vmm.session import Mode, Session

MIB = 1 << 20
pytestmark = pytest.mark.timeout(120)

KVMS = ["seed", "linux-6.8", "userfault-v3", "kvm"]
WAYS = [(name, mode) for name in KVMS for mode in Mode]


class Ran(NamedTuple):
    faults: int
    ahead: int
    source: object
    session: Session


def faults_of(session: Session) -> int:
    accounts = [loop.resolver.account for loop in session.vcpus]
    if session.handler is not None:
        accounts.append(session.handler.account)
    return sum(account.faults for account in accounts)


@pytest.fixture
def run(open_system, breakable) -> Callable[..., Ran]:
    """``run(name, mode, snapshot, window)``: to the end, every byte checked, no page read twice."""

    def run_(name: str, mode: Mode, taken, window: int) -> Ran:
        source = breakable(taken, set())
        system = open_system(name, mode)
        with Session(system, taken, source, mode, fault_around=window) as session:
            assert session.run(), session.failure
            result = report(session, 0)
            assert result.verdict == "right"
            assert max(source.given.values()) == 1
            assert sum(source.given.values()) == session.pager.pages_in
            around = result.ahead["around"]
            assert result.demanded + around.pages + result.eager_pages == result.pages_in
            return Ran(faults_of(session), around.pages, source, session)

    return run_


@pytest.mark.parametrize(("name", "mode"), WAYS)
def test_a_sequential_walk_has_a_fifth_of_the_faults(run, snapshot, name, mode) -> None:
    taken = snapshot(4 * MIB)
    without = run(name, mode, taken, OFF)
    fewer = run(name, mode, taken, DEFAULT_WINDOW)
    assert without.ahead == 0
    assert fewer.faults * 5 <= without.faults


@pytest.mark.parametrize(("name", "mode"), WAYS)
def test_a_random_walk_gets_next_to_nothing_ahead(run, snapshot, name, mode) -> None:
    taken = snapshot(4 * MIB, walk=Walk.RANDOM)
    ran = run(name, mode, taken, DEFAULT_WINDOW)
    assert ran.ahead < 1024 / 20
    assert ran.faults >= 1024 * 0.9


@pytest.mark.parametrize("walk", list(Walk))
@pytest.mark.parametrize("guest", list(GuestMode))
@pytest.mark.parametrize("name", ["seed", "kvm"])
def test_every_guest_comes_to_the_same(run, snapshot, monkeypatch, name, guest, walk) -> None:
    """Invariant: withheld or not, whatever KVM does with the access, no byte is another."""
    monkeypatch.setattr(
        pager_module, "draw", lambda run, asked=None: next((p for p in run if p != asked), None)
    )
    taken = snapshot(MIB, guest, walk, 1 if guest is GuestMode.REAL else 2)
    ran = run(name, Mode.EXIT, taken, 8)
    count = ran.session.pager.counts[Ahead.AROUND]
    assert count.withheld > 0
    assert count.wanted == count.withheld, "these guests leave no page out"


@pytest.mark.parametrize(("name", "mode"), [("seed", Mode.EXIT), ("kvm", Mode.EXIT)])
def test_four_vcpus_in_one_memory(run, snapshot, name, mode) -> None:
    taken = snapshot(8 * MIB, vcpus=4)
    assert run(name, mode, taken, 16).faults * 5 <= run(name, mode, taken, OFF).faults


@pytest.mark.parametrize(("name", "mode"), WAYS)
def test_a_hole_in_the_source_stops_who_needs_it_and_no_sooner(
    open_system, snapshot, breakable, name, mode
) -> None:
    """Invariant: the guest comes as far as it would come with one page at a time."""
    taken = snapshot(2 * MIB)
    hole = 301  # in the middle of a window
    source = breakable(taken, {hole})
    system = open_system(name, mode)
    with Session(system, taken, source, mode, fault_around=DEFAULT_WINDOW) as session:
        assert not session.run()
        assert session.failure is not None
        assert session.failure.offset == hole * PAGE_SIZE
        assert not session.pager.is_in(hole * PAGE_SIZE)
        assert session.pager.is_in((hole - 1) * PAGE_SIZE)
        source.broken = set()
        assert session.run(), session.failure
        assert report(session, 0).verdict == "right"
    assert max(source.given.values()) == 1
