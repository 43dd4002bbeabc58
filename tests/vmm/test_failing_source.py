"""A source that fails: nobody runs on without the page, the report says all, it can be mended."""

from __future__ import annotations

import threading
import time

import pytest

from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.walk import Walk
from guestfault.linux.pagemap import Pagemap
from guestfault.memory.ram import PAGE_SIZE
from guestfault.paging.source.base import SourceError
from guestfault.vmm.report import report
from guestfault.vmm.session import Mode, Session

SIZE = 1 << 20
EXIT, UFFD = Mode.EXIT, Mode.UFFD
CPL3, CPL0, REAL = GuestMode.LONG_CPL3, GuestMode.LONG_CPL0, GuestMode.REAL

RUNS = [
    ("seed", EXIT, CPL3),
    ("seed", EXIT, CPL0),
    ("seed", EXIT, REAL),
    ("seed", UFFD, CPL3),
    ("seed", UFFD, REAL),
    ("linux-6.8", UFFD, CPL3),
    ("kvm", UFFD, CPL3),
    ("kvm", UFFD, CPL0),
    ("kvm", UFFD, REAL),
    ("linux-6.8", EXIT, CPL3),
    ("kvm", EXIT, CPL3),
    ("kvm", EXIT, CPL0),
    ("kvm", EXIT, REAL),
]


def stop_at_failure(session: Session) -> str:
    """Run into the failure; the report's account of it."""
    assert not session.run()
    assert isinstance(session.failure, SourceError)
    result = report(session, 0)
    assert result.verdict == "not done"
    assert result.failure is not None
    return result.failure


def present(session: Session, page: int) -> bool:
    """Whether a page is in the guest's view.  Not touched: this thread might sleep in it."""
    with Pagemap() as pagemap:
        return pagemap.present(session.ram.guest.address + page * PAGE_SIZE)


@pytest.mark.parametrize(("kvm", "mode", "guest"), RUNS)
@pytest.mark.parametrize("walk", [Walk.RANDOM, Walk.WRITE_HEAVY])
def test_the_vcpu_stops_at_the_page_and_goes_on_from_there_when_the_source_is_mended(
    open_system, snapshot, breakable, layout_of, kvm, mode, guest, walk
) -> None:
    taken = snapshot(SIZE, guest, walk, vcpus=2)
    lost = layout_of(taken).share(1)[40]  # so it is vCPU 1 that needs it
    source = breakable(taken, {lost})
    with Session(open_system(kvm, mode), taken, source, mode) as session:
        for _ in range(3):  # it stays broken for a while
            text = stop_at_failure(session)
            assert session.failure.offset == lost * PAGE_SIZE
            assert f"4096 bytes at {lost * PAGE_SIZE:#x}" in text
            assert "Input/output error" in text
            assert f"vCPU 1 at rip {session.vcpus[1].rip:#x}" in text
            assert not session.vcpus[1].console.done
            assert not session.pager.is_in(lost * PAGE_SIZE)
            assert not present(session, lost)
            assert source.given[lost] == 0
        source.broken.clear()
        assert session.run(), session.failure
        result = report(session, 0)
        assert result.verdict == "right"
        assert result.failure is None
        assert [vcpu.checksum for vcpu in result.vcpus] == list(taken.guest.checksums)
        assert result.memory_right
    assert set(source.given.values()) == {1}, "a page was read twice"
    assert len(source.given) == taken.memory_size // PAGE_SIZE


@pytest.mark.parametrize(("kvm", "mode", "guest"), RUNS)
def test_a_page_that_is_needed_to_start_is_missed_before_the_start(
    open_system, snapshot, breakable, layout_of, kvm, mode, guest
) -> None:
    taken = snapshot(SIZE, guest)
    for lost in range(layout_of(taken).header_pages):
        source = breakable(taken, {lost})
        if (kvm, mode) == ("seed", EXIT):  # which reports every absence, and needs none to start
            with Session(open_system(kvm, mode), taken, source, mode) as session:
                stop_at_failure(session)
                assert session.vcpus[0].rip == taken.vcpus[0].regs.rip or lost
                source.broken.clear()
                assert session.run(), session.failure
                assert report(session, 0).verdict == "right"
        else:
            with pytest.raises(SourceError) as caught:
                Session(open_system(kvm, mode), taken, source, mode)
            assert caught.value.offset == lost * PAGE_SIZE


@pytest.mark.parametrize(("kvm", "mode"), [("seed", EXIT), ("seed", UFFD), ("kvm", UFFD)])
def test_a_source_that_fails_at_every_page_once_is_survived(
    open_system, snapshot, breakable, kvm, mode
) -> None:
    taken = snapshot(SIZE // 16, vcpus=2, walk=Walk.RANDOM)
    source = breakable(taken, set())
    with Session(open_system(kvm, mode), taken, source, mode) as session:
        source.broken = set(range(SIZE // 16 // PAGE_SIZE))
        failures = 0
        while not session.run():
            assert isinstance(session.failure, SourceError)
            source.broken.remove(session.failure.offset // PAGE_SIZE)
            failures += 1
        assert report(session, 0).verdict == "right"
    assert failures == SIZE // 16 // PAGE_SIZE - session.eager_pages


@pytest.mark.parametrize(("kvm", "mode"), [("seed", EXIT), ("seed", UFFD), ("kvm", UFFD)])
def test_a_defect_of_a_source_stops_the_session_and_comes_out_as_it_is(
    open_system, snapshot, layout_of, kvm, mode
) -> None:
    taken = snapshot()
    lost = layout_of(taken).data[40] * PAGE_SIZE
    memory = taken.memory_path.read_bytes()

    class Defective:
        size = len(memory)
        broken = True

        def read_into(self, offset: int, buffer: memoryview) -> None:
            if offset == lost and self.broken:
                raise ZeroDivisionError("a programming error")
            buffer[:] = memory[offset : offset + len(buffer)]

    source = Defective()
    with Session(open_system(kvm, mode), taken, source, mode) as session:
        with pytest.raises(ZeroDivisionError, match="a programming error"):
            session.run()
        source.broken = False
        assert session.run()
        assert report(session, 0).verdict == "right"


@pytest.mark.parametrize(("kvm", "mode"), [("seed", EXIT), ("seed", UFFD), ("kvm", UFFD)])
def test_stop_from_another_thread_and_go_on_as_often_as_one_likes(
    open_system, snapshot, breakable, kvm, mode
) -> None:
    taken = snapshot(SIZE, walk=Walk.ZIPF, vcpus=2)
    with Session(open_system(kvm, mode), taken, breakable(taken, set()), mode) as session:
        stops = 0
        while True:
            timer = threading.Timer(0.005, session.stop)
            timer.start()
            done = session.run()
            timer.join()
            if done:
                break
            assert session.failure is None
            stops += 1
        assert stops > 0
        assert report(session, 0).verdict == "right"


@pytest.mark.parametrize("kvm", ["seed", "kvm"])
def test_a_sleeper_whose_source_hangs_is_let_go_and_its_page_comes_later(
    open_system, snapshot, breakable, layout_of, kvm
) -> None:
    taken = snapshot(SIZE, vcpus=2)
    source = breakable(taken, set())
    hang = threading.Event()
    give = source._read_page
    slow_page = layout_of(taken).share(0)[3] * PAGE_SIZE

    def read(offset: int, length: int) -> bytes:
        if offset == slow_page and not hang.is_set():
            session.stop()
            # The vCPUs must come to rest although this page, and all after it, do not come.
            deadline = time.monotonic() + 5
            while any(thread.is_alive() for thread in session._threads.values()):
                assert time.monotonic() < deadline, "a vCPU still sleeps"
                time.sleep(0.001)
            hang.set()
        return give(offset, length)

    source._read = read
    with Session(open_system(kvm, UFFD), taken, source, UFFD) as session:
        assert not session.run()
        assert hang.is_set()
        assert session.failure is None
        assert session.run()
        assert report(session, 0).verdict == "right"
