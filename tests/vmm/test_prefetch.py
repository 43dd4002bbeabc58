"""Recorded once, prefetched after: on every KVM, in both modes, whatever the source does."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import closing

import pytest

from guestfault.errors import Unavailable
from guestfault.fault.locate.decode import DecodeLocator
from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.manifest import Slot
from guestfault.guest.snapshot import Snapshot, save
from guestfault.guest.walk import Walk
from guestfault.linux.tracefs import Tracefs
from guestfault.memory.ram import PAGE_SIZE
from guestfault.paging.prefetcher import AS_FAST_AS_IT_GOES, Plan
from guestfault.paging.source.base import (
    SourceInterruptedError,
    SourceUnavailableError,
    close,
    trouble,
)
from guestfault.paging.source.file import FileSource
from guestfault.paging.source.http import HttpSource
from guestfault.paging.source.resilient import FOREVER, Patience, ResilientSource
from guestfault.vmm.compiled import Loop
from guestfault.vmm.report import Report, report
from guestfault.vmm.session import Mode, Session

pytestmark = pytest.mark.timeout(60)

MIB = 1 << 20
RUNS = [
    ("seed", Mode.EXIT),
    ("seed", Mode.UFFD),
    ("linux-6.8", Mode.EXIT),
    ("userfault-v3", Mode.EXIT),
    ("kvm", Mode.EXIT),
    ("kvm", Mode.UFFD),
]


class Slow:
    """A snapshot's memory, with so many seconds for each read; ``broken`` makes reads fail."""

    def __init__(self, snapshot: Snapshot, seconds: float = 200e-6) -> None:
        self._memory = memoryview(snapshot.memory_path.read_bytes())
        self.size = len(self._memory)
        self.seconds = seconds
        self.broken: Callable[[int], bool] = lambda page: False
        self.reads = 0

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.reads += 1
        time.sleep(self.seconds)
        if any(map(self.broken, range(offset >> 12, offset + len(buffer) >> 12))):
            raise SourceUnavailableError(offset, len(buffer), "refused")
        buffer[:] = self._memory[offset : offset + len(buffer)]


def faults(result: Report) -> int:
    shapes = ("annotated", "bare", "ram_mmio", "fetches", "silent")
    return result.userfaults + sum(getattr(v, name) for v in result.vcpus for name in shapes)


def finished(session: Session) -> Report:
    assert session.run(), session.failure
    result = report(session, time.monotonic() - session.began)
    assert result.verdict == "right"
    by_reason = sum(count.pages for count in result.ahead.values())
    assert result.pages_in == result.pages == result.eager_pages + result.demanded + by_reason
    assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
    return result


def order_of(system, taken: Snapshot, mode: Mode) -> tuple[range, ...]:
    with Session(system, taken, Slow(taken, 0), mode, record=True) as session:
        result = finished(session)
        assert not any(count.pages for count in result.ahead.values())
        assert session.recording is not None
        return session.recording.runs()


# -- what is recorded ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kvm", "mode"), RUNS)
@pytest.mark.parametrize("walk", [Walk.SEQUENTIAL, Walk.RANDOM])
def test_the_order_is_the_guests(open_system, snapshot, layout_of, kvm, mode, walk) -> None:
    """One vCPU: its data pages are in the record in the order in which its walk goes over them."""
    taken = snapshot(MIB, walk=walk)
    runs = order_of(open_system(kvm, mode), taken, mode)
    order = [page for run in runs for page in run]
    assert sorted(order) == list(range(taken.memory_size // PAGE_SIZE))
    data = layout_of(taken).data
    walked = [page for page in order if page in data]
    if walk is Walk.SEQUENTIAL:
        assert walked == list(data)
    else:
        again = order_of(open_system("seed"), taken, Mode.EXIT)
        assert walked == [page for run in again for page in run if page in data]
        assert walked != sorted(walked)


def test_each_vcpus_order_is_in_the_order_of_all(open_system, snapshot, layout_of) -> None:
    taken = snapshot(MIB, walk=Walk.SEQUENTIAL, vcpus=3)
    order = [page for run in order_of(open_system("seed"), taken, Mode.EXIT) for page in run]
    assert sorted(order) == list(range(256))
    layout = layout_of(taken)
    for vcpu in range(3):
        share = layout.share(vcpu)
        assert [page for page in order if page in share] == list(share)


def test_a_run_that_was_stopped_has_recorded_what_was_touched(open_system, snapshot) -> None:
    taken = snapshot(MIB)
    source = Slow(taken, 0.002)
    with Session(open_system("seed"), taken, source, record=True) as session:
        assert not session.run(
            lambda: session.stop() if session.pager.pages_in > 20 else None, 0.01
        )
        recorded = sum(map(len, session.recording.runs()))
        assert 20 < recorded == session.pager.pages_in < 256


# -- what it is worth ------------------------------------------------------------------------------


@pytest.mark.parametrize(("kvm", "mode"), RUNS)
@pytest.mark.parametrize("walk", [Walk.SEQUENTIAL, Walk.RANDOM])
@pytest.mark.parametrize("vcpus", [1, 2])
def test_with_the_order_there_are_few_faults_and_no_wrong_byte(
    open_system, snapshot, kvm, mode, walk, vcpus
) -> None:
    taken = snapshot(4 * MIB, walk=walk, vcpus=vcpus)
    system = open_system(kvm, mode)
    runs = order_of(system, taken, mode)
    source = Slow(taken)
    with Session(system, taken, source, mode, ahead=Plan(runs)) as session:
        result = finished(session)
    assert result.ahead["prefetch"].pages > 0.8 * result.pages
    if walk is Walk.SEQUENTIAL:
        assert faults(result) < result.pages / 5
    assert source.reads <= result.pages
    # Every page was needed, so every page that was withheld was faulted on.
    prefetched = result.ahead["prefetch"]
    assert prefetched.wanted == prefetched.withheld
    assert result.prefetch.planned == result.pages


@pytest.mark.parametrize(("kvm", "mode"), RUNS)
@pytest.mark.parametrize("guest", GuestMode)
def test_the_order_of_one_kvm_serves_another(open_system, snapshot, kvm, mode, guest) -> None:
    """The pages are the guest's; who recorded them makes no difference to what comes out."""
    taken = snapshot(MIB // 2, guest, Walk.ZIPF, vcpus=2)
    runs = order_of(open_system("seed"), taken, Mode.EXIT)
    with Session(open_system(kvm, mode), taken, Slow(taken), mode, ahead=Plan(runs)) as session:
        finished(session)


@pytest.mark.parametrize(("kvm", "mode"), RUNS)
def test_an_order_that_is_all_wrong_costs_time_and_no_byte(
    open_system, snapshot, kvm, mode
) -> None:
    taken = snapshot(MIB, walk=Walk.RANDOM, vcpus=2)
    runs = (range(200, 256), *(range(n, n + 1) for n in range(90, 10, -3)))
    with Session(open_system(kvm, mode), taken, Slow(taken), mode, ahead=Plan(runs)) as session:
        finished(session)


@pytest.mark.parametrize(("kvm", "mode"), RUNS)
def test_a_push_without_an_order(open_system, snapshot, kvm, mode) -> None:
    taken = snapshot(4 * MIB, walk=Walk.RANDOM, vcpus=2)
    plan = Plan(push=AS_FAST_AS_IT_GOES)
    with Session(open_system(kvm, mode), taken, Slow(taken), mode, ahead=plan) as session:
        result = finished(session)
    assert result.ahead["push"].pages > 0
    assert result.ahead["prefetch"].pages == 0


def test_beside_the_compiled_loop(open_system, snapshot, tracefs, monkeypatch) -> None:
    """A loop that holds no lock of Python's, and threads that do, fill each page once."""
    pytest.importorskip("numba", reason="numba is not installed: pip install 'guestfault[fast]'")
    monkeypatch.setattr(Tracefs, "find", lambda: tracefs)
    taken = snapshot(4 * MIB, walk=Walk.RANDOM, vcpus=2)
    runs = order_of(open_system("kvm"), taken, Mode.EXIT)
    for plan in (Plan(runs[len(runs) // 2 :]), Plan(push=AS_FAST_AS_IT_GOES), Plan(runs)):
        with closing(FileSource(taken.open_memory())) as source:
            try:
                session = Session(open_system("kvm"), taken, source, loop=Loop.COMPILED, ahead=plan)
            except Unavailable as error:
                pytest.skip(str(error))
            with session:
                finished(session)


# -- what can go wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize(("kvm", "mode"), RUNS)
def test_a_prefetch_that_fails_leaves_the_page_to_demand(
    open_system, snapshot, kvm, mode, monkeypatch
) -> None:
    monkeypatch.setattr("guestfault.paging.prefetcher._FIRST_PAUSE", 0.001)
    taken = snapshot(MIB, walk=Walk.RANDOM)
    source = Slow(taken)
    source.broken = lambda page: threading.current_thread().name.startswith("prefetch")
    with Session(open_system(kvm, mode), taken, source, mode, ahead=Plan([range(256)])) as session:
        result = finished(session)
    assert session.pager.ahead == 0
    assert result.prefetch.failed > 0
    assert faults(result) >= result.demanded > 200


def test_a_page_that_is_lost_to_all_stops_the_run_and_it_goes_on_when_mended(
    open_system, snapshot
) -> None:
    taken = snapshot(MIB, walk=Walk.RANDOM, vcpus=2)
    source = Slow(taken)
    source.broken = lambda page: page == 100
    with Session(open_system("seed"), taken, source, ahead=Plan([range(256)], push=1e6)) as session:
        for _ in range(2):
            assert not session.run()
            assert session.failure.offset == 100 * PAGE_SIZE
            assert not session.pager.is_in(100 * PAGE_SIZE)
        source.broken = lambda page: False
        finished(session)


@pytest.mark.parametrize(("kvm", "mode"), RUNS)
def test_a_server_that_is_killed_and_comes_back(open_system, serve, snapshot, kvm, mode) -> None:
    """Those who go ahead wait for it as the vCPUs do, and nobody fails for it."""
    taken = snapshot(MIB, walk=Walk.RANDOM, vcpus=2)
    server = serve("http", taken.memory_path)
    server.be("delay 0.002")
    source = ResilientSource(HttpSource(server.url, 10), Patience(FOREVER, first=0.01, limit=0.05))
    runs = order_of(open_system("seed"), taken, Mode.EXIT)
    outages = []
    try:
        with Session(open_system(kvm, mode), taken, source, mode, ahead=Plan(runs, 2)) as session:

            def watch() -> None:
                if not outages and session.pager.pages_in > 60:
                    server.kill()
                    while trouble(source) is None:
                        time.sleep(0.005)
                    time.sleep(0.1)
                    server.start()
                    outages.append(session.pager.pages_in)

            assert session.run(watch, interval=0.01), session.failure
            result = report(session, 0)
            assert (result.verdict, len(outages)) == ("right", 1)
            assert result.prefetch.failed == 0
    finally:
        close(source)


@pytest.mark.parametrize(("kvm", "mode"), RUNS)
def test_stop_ends_it_at_once_and_it_goes_on_after(
    open_system, serve, snapshot, stopped_at_once, kvm, mode
) -> None:
    taken = snapshot(MIB, walk=Walk.RANDOM, vcpus=2)
    server = serve("http", taken.memory_path)
    source = ResilientSource(HttpSource(server.url, 600), Patience(FOREVER))
    plan = Plan([range(256)], push=AS_FAST_AS_IT_GOES)
    try:
        with Session(open_system(kvm, mode), taken, source, mode, ahead=plan) as session:
            server.be("stall")
            for _ in range(2):
                stopped_at_once(session, 0.2)
                assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]
            server.be("good")
            finished(session)
    finally:
        close(source)


def test_a_guest_that_ends_first_does_not_wait_for_what_it_does_not_need(
    open_system, snapshot, tmp_path
) -> None:
    taken = snapshot(MIB)
    slots = [Slot(0, 0, MIB, 0), Slot(1, 64 * MIB, PAGE_SIZE, MIB)]  # the guest knows of one
    memory = taken.memory_path.read_bytes() + bytes(PAGE_SIZE)
    larger = save(tmp_path / "larger", memory, taken.vcpus, slots=slots)
    interrupted = threading.Event()

    class Hangs(Slow):
        def read_into(self, offset: int, buffer: memoryview) -> None:
            if offset == MIB:
                assert interrupted.wait(30)
                raise SourceInterruptedError(offset, len(buffer))
            super().read_into(offset, buffer)

        def interrupt(self) -> None:
            interrupted.set()

        def resume(self) -> None:
            interrupted.clear()

    with Session(
        open_system("seed"), larger, Hangs(larger, 0), ahead=Plan([range(256, 257)])
    ) as session:
        began = time.monotonic()
        assert session.run(), session.failure
        assert time.monotonic() - began < 5
        assert session.vcpus[0].console.checksum == taken.guest.checksums[0]
        assert session.pager.pages_in == 256
        assert not [t for t in threading.enumerate() if t.name.startswith("prefetch")]


@pytest.mark.parametrize("kvm", ["linux-6.8", "kvm"])
def test_pages_that_are_there_by_the_time_one_looks_which_it_was_are_no_loop(
    open_system, snapshot, kvm, monkeypatch
) -> None:
    """Invariant: a vCPU that gets on is not stopped for a loop, whoever brings in its pages.

    Every fault here is raced: before it is looked into, its page comes in ahead.
    """
    taken = snapshot(MIB)
    honest = DecodeLocator.locate

    def late(self, *args):
        [best, *_] = honest(self, *args)
        if best.certain:
            session.pager.bring_in_ahead((best.hva - session.ram.guest.address) // PAGE_SIZE, 1)
        return honest(self, *args)

    monkeypatch.setattr(DecodeLocator, "locate", late)
    monkeypatch.setattr("guestfault.vmm.arming.WORTH_IT", 1 << 62)
    with Session(open_system(kvm), taken, Slow(taken, 0)) as session:
        result = finished(session)
    assert result.vcpus[0].unsure > 200
    assert result.demanded < 10
