"""Guests whose memory is on a server that stalls, dies, lies, and comes back.

The server is a process of its own; it is killed with SIGKILL and started again.  Whatever it does,
a vCPU runs on with the right page or not at all.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from guestfault.guest.packed import open_snapshot, pack
from guestfault.guest.snapshot import Snapshot
from guestfault.guest.walk import Walk
from guestfault.memory.ram import PAGE_SIZE
from guestfault.paging.source.base import PageSource, SourceError, close, trouble
from guestfault.paging.source.http import HttpSource
from guestfault.paging.source.location import open_pages
from guestfault.paging.source.nbd import NbdSource
from guestfault.paging.source.resilient import FOREVER, Patience, ResilientSource
from guestfault.vmm.report import report
from guestfault.vmm.session import Mode, Session

pytestmark = pytest.mark.timeout(60)

SIZE = 1 << 20
RUNS = [("seed", Mode.EXIT), ("seed", Mode.UFFD), ("linux-6.8", Mode.EXIT), ("kvm", Mode.EXIT)]
QUICK = Patience(FOREVER, first=0.01, limit=0.05)
AT_ONCE = Patience(wait=0)


@pytest.fixture
def taken(snapshot) -> Snapshot:
    return snapshot(SIZE, walk=Walk.RANDOM, vcpus=4)


@pytest.fixture
def packed(taken: Snapshot, tmp_path: Path) -> Path:
    path = tmp_path / "packed"
    with open_snapshot(taken.path) as opened:
        pack(opened, path, block_size=2 * PAGE_SIZE)
    return path


@pytest.fixture
def page_source() -> Iterator[Callable[..., PageSource]]:
    """A source that asks the server for each page by itself, so that there is much to go wrong."""
    opened: list[PageSource] = []

    def open_(kind: str, url: str, patience: Patience, timeout: float = 10) -> PageSource:
        inner = HttpSource(url, timeout) if kind == "http" else NbdSource(url, timeout)
        opened.append(ResilientSource(inner, patience))
        return opened[-1]

    yield open_
    for source in opened:
        close(source)


def assert_right(session: Session) -> None:
    result = report(session, 0)
    assert result.verdict == "right", result
    assert session.pager.pages_in == session.ram.pages


@pytest.mark.parametrize(("kvm", "mode"), RUNS)
@pytest.mark.parametrize("kind", ["http", "nbd"])
def test_a_server_that_is_killed_and_comes_back(
    open_system, serve, taken, page_source, kvm, mode, kind
) -> None:
    server = serve(kind, taken.memory_path)
    server.be("delay 0.002")
    source = page_source(kind, server.url, QUICK)
    with Session(open_system(kvm, mode), taken, source, mode) as session:
        outages = []

        def watch() -> None:
            if len(outages) < 3 and session.pager.pages_in > 60 * (1 + len(outages)):
                server.kill()
                before = session.pager.pages_in
                while trouble(source) is None:
                    time.sleep(0.005)
                time.sleep(0.1)
                assert session.pager.pages_in - before <= 4  # what was on its way
                server.start()
                server.be("delay 0.002")
                outages.append(before)

        assert session.run(watch, interval=0.01), session.failure
        assert len(outages) == 3
        assert_right(session)


@pytest.mark.parametrize(("kvm", "mode"), RUNS)
@pytest.mark.parametrize("kind", ["http", "nbd"])
@pytest.mark.parametrize("how", ["die", "cut", "stall"])
def test_without_patience_it_stops_and_goes_on_when_the_server_is_mended(
    open_system, serve, taken, page_source, kvm, mode, kind, how
) -> None:
    server = serve(kind, taken.memory_path)
    source = page_source(kind, server.url, AT_ONCE, timeout=0.3)
    with Session(open_system(kvm, mode), taken, source, mode) as session:
        server.be(how)
        for _ in range(2):
            began = time.monotonic()
            assert not session.run()
            assert time.monotonic() - began < 2
            assert isinstance(session.failure, SourceError)
            assert server.url in str(session.failure)
            assert not session.pager.is_in(session.failure.offset)
        server.be("good")
        assert session.run(), session.failure
        assert_right(session)


@pytest.mark.parametrize(("kvm", "mode"), RUNS)
@pytest.mark.parametrize("kind", ["http", "nbd"])
def test_a_wrong_byte_is_found_by_its_digest_and_never_mapped(
    open_system, serve, taken, packed, kvm, mode, kind
) -> None:
    server = serve(kind, packed)
    with open_snapshot(server.url, patience=QUICK) as opened:
        system = open_system(kvm, mode)
        with Session(system, opened.snapshot, opened.source, mode) as session:
            lies = []

            def watch() -> None:
                if session.pager.pages_in > 100 and not lies:
                    server.be("wrong bytes")
                    lies.append(session.pager.pages_in)

            server.be("delay 0.002")
            assert not session.run(watch, interval=0.005)
            assert isinstance(session.failure, SourceError)
            assert "is damaged: " in str(session.failure)
            assert "of the packed file" in str(session.failure)
            assert not session.pager.is_in(session.failure.offset)
            assert session.pager.pages_in < session.ram.pages
            server.be("good")
            # Every checksum and every byte at the end is right only if no page ever was wrong.
            assert session.run(), session.failure
            assert_right(session)


@pytest.mark.parametrize("how", ["wrong range", "wrong length", "changed", "status 404", "whole"])
def test_a_lie_stops_even_the_most_patient(open_system, serve, taken, page_source, how) -> None:
    server = serve("http", taken.memory_path)
    source = page_source("http", server.url, QUICK)
    with Session(open_system("seed"), taken, source) as session:
        server.be(how)
        assert not session.run()
        assert isinstance(session.failure, SourceError)
        assert session.pager.pages_in == 0
        server.be("good")
        assert session.run(), session.failure
        assert_right(session)


def test_those_who_need_no_page_of_it_run_on(open_system, taken) -> None:
    """A vCPU waits for its own page only: three go to their ends while one waits."""
    waits, go_on = threading.Event(), threading.Event()
    memory = taken.memory_path.read_bytes()
    lost: list[int] = []

    class OnePage:
        size = len(memory)

        def read_into(self, offset: int, buffer: memoryview) -> None:
            if threading.current_thread().name == "vcpu2" and not lost and done_pages() > 40:
                lost.append(offset)
            if offset in lost:
                waits.set()
                assert go_on.wait(30)
            buffer[:] = memory[offset : offset + len(buffer)]

    def done_pages() -> int:
        return session.pager.pages_in

    with Session(open_system("seed"), taken, OnePage()) as session:

        def watch() -> None:
            if [loop.console.done for loop in session.vcpus] == [True, True, False, True]:
                go_on.set()

        assert session.run(watch, interval=0.01), session.failure
        assert waits.is_set()
        assert_right(session)


@pytest.mark.parametrize("kind", ["http", "nbd"])
def test_the_reads_of_four_vcpus_overlap(open_system, serve, taken, page_source, kind) -> None:
    server = serve(kind, taken.memory_path)
    server.be("delay 0.0002")
    source = page_source(kind, server.url, QUICK)
    with Session(open_system("seed"), taken, source) as session:
        assert session.run(), session.failure
        assert_right(session)
    stats = server.stats()
    assert stats["most"] > 1
    assert stats["requests"] == taken.memory_size // PAGE_SIZE + (kind == "http")


@pytest.mark.parametrize(("kvm", "mode"), RUNS)
@pytest.mark.parametrize("kind", ["http", "nbd"])
def test_stop_ends_the_wait_for_a_server_that_hangs(
    open_system, serve, taken, page_source, stopped_at_once, kvm, mode, kind
) -> None:
    server = serve(kind, taken.memory_path)
    source = page_source(kind, server.url, QUICK, timeout=600)
    with Session(open_system(kvm, mode), taken, source, mode) as session:
        for _ in range(2):
            server.be("stall")
            stopped_at_once(session, 0.3)
        server.be("good")
        assert session.run(), session.failure
        assert_right(session)


def test_stop_ends_the_wait_for_a_server_that_is_gone(
    open_system, serve, taken, page_source
) -> None:
    server = serve("http", taken.memory_path)
    source = page_source("http", server.url, Patience(FOREVER, first=60, limit=60))
    with Session(open_system("seed"), taken, source) as session:
        server.kill()

        def watch() -> None:
            if trouble(source) is not None:
                session.stop()

        began = time.monotonic()
        assert not session.run(watch)
        assert time.monotonic() - began < 1.5
        assert session.failure is None


@pytest.mark.parametrize("kind", ["http", "nbd", "file"])
@pytest.mark.parametrize("what", ["raw", "packed"])
def test_every_way_to_memory_leads_to_the_right_end(
    open_system, serve, taken, packed, kind, what
) -> None:
    path = packed if what == "packed" else taken.memory_path
    where = str(path) if kind == "file" else serve(kind, path).url
    source = open_pages(where)
    try:
        with Session(open_system("seed"), taken, source) as session:
            assert session.run(), session.failure
            assert_right(session)
    finally:
        close(source)
