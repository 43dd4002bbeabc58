"""The compiled loop and the plain one come to the same, by every count that the report has."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest

from guestfault.errors import Unavailable
from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.walk import Walk
from guestfault.linux.mapping import Mapping
from guestfault.memory.ram import PAGE_SIZE
from guestfault.paging.source.base import SourceError, close
from guestfault.paging.source.file import FileSource
from guestfault.paging.source.memory import MemorySource
from guestfault.vmm import compiled
from guestfault.vmm.compiled import Loop
from guestfault.vmm.report import Latency, Report, report
from guestfault.vmm.session import Mode, Session

MIB = 1 << 20
pytestmark = pytest.mark.timeout(120)


@pytest.fixture
def numba() -> None:
    pytest.importorskip("numba", reason="numba is not installed: pip install 'guestfault[fast]'")


def without_times(result: Report) -> Report:
    return replace(result, seconds=0, first_instruction=0, latency=Latency(0, 0, 0, 0))


def run(system, taken, source, loop: Loop) -> tuple[Report, Session]:
    with Session(system, taken, source, loop=loop) as session:
        assert session.run(), session.failure
        return report(session, 0), session


@pytest.mark.parametrize("vcpus", [1, 2, 4])
@pytest.mark.parametrize("walk", [Walk.RANDOM, Walk.WRITE_HEAVY])
def test_both_loops_make_the_same_report(open_system, snapshot, traced, numba, vcpus, walk) -> None:
    """Invariant: the vCPUs' shares are apart, so each one's faults do not depend on the loop."""
    taken = snapshot(4 * MIB, GuestMode.LONG_CPL3, walk, vcpus)
    reports = {}
    for loop in (Loop.PLAIN, Loop.COMPILED):
        source = FileSource(taken.open_memory())
        reports[loop], session = run(open_system("kvm"), taken, source, loop)
        source.close()
        assert session.why_plain is None
    assert reports[Loop.COMPILED].verdict == "right"
    plain, fast = (without_times(reports[loop]) for loop in (Loop.PLAIN, Loop.COMPILED))
    shared = {"again", "bare", "by_tracepoint"}  # of the header's pages, who is first is chance
    for one, other in zip(plain.vcpus, fast.vcpus, strict=True):
        for name in one.__slots__:
            if name not in shared or vcpus == 1:
                assert getattr(one, name) == getattr(other, name), name
    assert replace(plain, vcpus=()) == replace(fast, vcpus=())
    assert abs(sum(v.bare - v.again for v in plain.vcpus) - sum(v.bare for v in fast.vcpus)) <= 64
    counted = reports[Loop.COMPILED].latency
    assert 0 < counted.p50 <= counted.p99 <= counted.max


@pytest.mark.parametrize("vcpus", [1, 2])
@pytest.mark.parametrize("kind", [FileSource, MemorySource])
def test_both_loops_bring_the_same_in_around(
    open_system, snapshot, traced, numba, monkeypatch, vcpus, kind
) -> None:
    """Invariant: windows do not depend on the loop, but for the pages that the lot falls on."""
    monkeypatch.setattr("guestfault.paging.pager.draw", lambda _run, _asked=None: None)
    taken = snapshot(8 * MIB * vcpus, GuestMode.LONG_CPL3, Walk.SEQUENTIAL, vcpus)
    demanded = {}
    for loop in (Loop.PLAIN, Loop.COMPILED):
        source = FileSource(taken.open_memory())
        if kind is MemorySource:
            close(source)
            source = MemorySource(content := Mapping.anonymous(taken.memory_size))
            content.view()[:] = taken.memory_path.read_bytes()
        with Session(open_system("kvm"), taken, source, loop=loop, fault_around=16) as session:
            assert session.run(), session.failure
            result = report(session, 0)
        close(source)
        assert result.verdict == "right"
        faults = sum(v.bare for v in result.vcpus)
        around = result.ahead["around"]
        assert faults * 5 < result.pages
        assert result.demanded + around.pages + result.eager_pages == result.pages_in
        assert around.wanted == around.withheld, "this guest leaves no page out"
        demanded[loop] = result.demanded
    # It begins anew where the vCPU changes over, which is not before it is listened to.
    assert abs(demanded[Loop.PLAIN] - demanded[Loop.COMPILED]) <= 5 * vcpus


def test_a_source_that_only_python_can_read(
    open_system, snapshot, breakable, traced, numba
) -> None:
    taken = snapshot(MIB, GuestMode.LONG_CPL3, Walk.RANDOM, 2)
    source = breakable(taken, set())
    result, _ = run(open_system("kvm"), taken, source, Loop.COMPILED)
    assert result.verdict == "right"
    assert max(source.given.values()) == 1, "a page is read once"


def test_a_truncated_file_stops_the_run_and_maps_nothing(
    open_system, snapshot, tmp_path, traced, numba
) -> None:
    """Invariant: a page that cannot be had whole is not mapped, and can be had once it is there."""
    taken = snapshot(MIB, GuestMode.LONG_CPL3, Walk.SEQUENTIAL, 1)
    content = taken.memory_path.read_bytes()
    path = tmp_path / "memory"
    path.write_bytes(content)
    source = FileSource(os.open(path, os.O_RDONLY))
    os.truncate(path, 200 * PAGE_SIZE + 100)
    with Session(open_system("kvm"), taken, source, loop=Loop.COMPILED) as session:
        assert not session.run()
        assert isinstance(session.failure, SourceError)
        assert session.failure.offset == 200 * PAGE_SIZE
        assert not session.pager.is_in(200 * PAGE_SIZE)
        path.write_bytes(content)
        assert session.run(), session.failure
        assert report(session, 0).verdict == "right"
    source.close()


def test_it_can_be_stopped_and_goes_on(open_system, snapshot, traced, numba) -> None:
    """Invariant: a kick ends the compiled loop as it ends KVM_RUN."""
    taken = snapshot(4 * MIB, GuestMode.LONG_CPL3, Walk.RANDOM, 2)
    source = FileSource(taken.open_memory())
    with Session(open_system("kvm"), taken, source, loop=Loop.COMPILED) as session:
        runs = 0
        while not session.run(session.stop, interval=0.01):
            assert session.failure is None
            runs += 1
            assert runs < 10_000
        assert report(session, 0).verdict == "right"
    source.close()
    assert runs > 0


def test_auto_begins_plain_and_changes_over_when_it_pays(
    open_system, snapshot, traced, numba, monkeypatch
) -> None:
    monkeypatch.setattr(compiled, "PAYS_AFTER", 100)
    entered = []
    make = compiled.Compiled._make
    monkeypatch.setattr(
        compiled.Compiled,
        "_make",
        lambda self, locator: (entered.append(self._resolver.account.faults), make(self, locator)),
    )
    taken = snapshot(MIB, GuestMode.LONG_CPL3, Walk.RANDOM, 1)
    source = FileSource(taken.open_memory())
    result, _ = run(open_system("kvm"), taken, source, Loop.AUTO)
    source.close()
    assert result.verdict == "right"
    assert entered == [100]


def test_without_numba_the_plain_loop_serves(open_system, snapshot, monkeypatch) -> None:
    monkeypatch.setattr(compiled, "find_spec", lambda _name: None)
    taken = snapshot(MIB, GuestMode.LONG_CPL3, Walk.RANDOM, 1)
    source = FileSource(taken.open_memory())
    result, session = run(open_system("kvm"), taken, source, Loop.AUTO)
    assert result.verdict == "right"
    assert session.why_plain is not None
    assert "numba" in str(session.why_plain)
    with pytest.raises(Unavailable, match="numba"):
        Session(open_system("kvm"), taken, source, loop=Loop.COMPILED)
    source.close()


@pytest.mark.parametrize(
    ("name", "mode", "says"), [("seed", Mode.EXIT, "Python"), ("seed", Mode.UFFD, "no vCPU")]
)
def test_where_it_cannot_be_had_it_says_so(open_system, snapshot, name, mode, says) -> None:
    taken = snapshot(MIB)
    source = FileSource(taken.open_memory())
    system = open_system(name, mode)
    with pytest.raises(Unavailable, match=says):
        Session(system, taken, source, mode, loop=Loop.COMPILED)
    with Session(system, taken, source, mode, loop=Loop.AUTO) as session:
        assert session.run()
        assert session.why_plain is None, "nobody need be told that the software KVM is Python"
    source.close()
