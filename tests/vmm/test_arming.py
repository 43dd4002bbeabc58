"""A vCPU that keeps having bare faults gets tracepoints, and the run is none the worse for it."""

from __future__ import annotations

import pytest

from guestfault.errors import Unavailable
from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.walk import Walk
from guestfault.linux.tracefs import Tracefs
from guestfault.memory.ram import PAGE_SIZE
from guestfault.vmm.arming import WORTH_IT
from guestfault.vmm.report import report
from guestfault.vmm.session import Session

MIB = 1 << 20


@pytest.mark.parametrize(
    ("walk", "vcpus"), [(Walk.RANDOM, 1), (Walk.SEQUENTIAL, 2), (Walk.WRITE_HEAVY, 2)]
)
def test_after_enough_bare_faults_the_tracepoints_name_them(
    open_system, session_of, snapshot, traced, walk, vcpus
) -> None:
    taken = snapshot(MIB, GuestMode.LONG_CPL3, walk, vcpus)
    with session_of(open_system("kvm"), taken) as session:
        assert session.run(), session.failure
        result = report(session, 0)
    assert result.verdict == "right"
    for vcpu in result.vcpus:
        # The fault that arms them is not on record yet: it is the last to be decoded.
        assert vcpu.by_decode == WORTH_IT
        assert vcpu.by_tracepoint == vcpu.bare - WORTH_IT > 0
        assert vcpu.unsure == 0


def test_few_faults_are_decoded(open_system, session_of, snapshot, traced) -> None:
    with session_of(open_system("kvm"), snapshot(MIB // 4)) as session:
        assert session.run(), session.failure
        [vcpu] = report(session, 0).vcpus
    assert (vcpu.by_tracepoint, vcpu.by_decode) == (0, vcpu.bare)
    assert 0 < vcpu.bare < WORTH_IT


@pytest.mark.parametrize("vcpus", [1, 2])
def test_a_run_that_stops_and_goes_on_is_listened_to_on_its_new_threads(
    open_system, snapshot, breakable, layout_of, traced, vcpus
) -> None:
    taken = snapshot(2 * MIB, GuestMode.LONG_CPL3, Walk.RANDOM, vcpus)
    shares = [layout_of(taken).share(vcpu) for vcpu in range(vcpus)]
    # Far enough into every share that the vCPU is listened to when it gets there, most likely.
    broken = {share[len(share) // 2] for share in shares}
    source = breakable(taken, broken)
    with Session(open_system("kvm"), taken, source) as session:
        stops = 0
        while not session.run():
            assert session.failure is not None
            assert source.broken, session.failure
            source.broken.clear()
            stops += 1
            assert all(loop._locators.tracepoint is None for loop in session.vcpus)
        result = report(session, 0)
    assert stops == 1
    assert result.verdict == "right"
    assert sum(vcpu.by_tracepoint for vcpu in result.vcpus) > 0
    assert all(vcpu.by_tracepoint + vcpu.by_decode == vcpu.bare for vcpu in result.vcpus)
    assert source.given.total() == taken.memory_size // PAGE_SIZE


def test_where_there_is_no_tracefs_all_are_decoded(
    open_system, session_of, snapshot, monkeypatch
) -> None:
    def not_mounted() -> Tracefs:
        raise Unavailable("tracefs", "not mounted")

    monkeypatch.setattr(Tracefs, "find", not_mounted)
    with session_of(open_system("kvm"), snapshot(MIB)) as session:
        assert session.run(), session.failure
        result = report(session, 0)
    [vcpu] = result.vcpus
    assert result.verdict == "right"
    assert vcpu.bare == vcpu.by_decode > WORTH_IT
