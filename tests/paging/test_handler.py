"""The handler serves a real userfaultfd; the vCPUs are threads that ask the kernel for pages."""

from __future__ import annotations

import errno
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from guestfault.errors import Unavailable
from guestfault.linux import process_memory
from guestfault.linux.pagemap import Pagemap
from guestfault.linux.userfaultfd import PageFault
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.view import Registered
from guestfault.paging.handler import UserfaultHandler
from guestfault.paging.pager import Pager
from guestfault.paging.source.base import SourceError
from guestfault.paging.source.function import FunctionSource


class Served:
    """RAM whose absent pages a handler brings in, and threads that sleep in them."""

    def __init__(self, ram: GuestRam, view: Registered, pager: Pager) -> None:
        self.ram = ram
        self.view = view
        self.pager = pager
        self.failures: list[tuple[PageFault, Exception]] = []
        self.failed = threading.Event()
        self.handler = UserfaultHandler(pager, view, self._on_failure)
        self.pool = ThreadPoolExecutor(4)

    def _on_failure(self, fault: PageFault, error: Exception) -> None:
        self.failures.append((fault, error))
        self.failed.set()

    def touch(self, page: int) -> Future[bytes | None]:
        """Read a page as KVM would; ``None`` if the access fails."""
        address = self.ram.guest.address + page * PAGE_SIZE
        return self.pool.submit(process_memory.read, address, PAGE_SIZE)

    def close(self) -> None:
        self.handler.close()
        self.view.shut()  # so that no thread is left asleep
        self.pool.shutdown()


@pytest.fixture
def view(ram: GuestRam) -> Iterator[Registered]:
    try:
        view = Registered(ram, sigbus=False)
    except Unavailable as error:
        pytest.skip(str(error))
    yield view
    view.close()


@pytest.fixture
def served(ram, view, source) -> Iterator[Served]:
    served = Served(ram, view, Pager(ram, view, source))
    yield served
    served.close()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def asleep(touching: Future[bytes | None]) -> bool:
    """Whether an access stays unanswered for a while."""
    time.sleep(0.05)
    return not touching.done()


def test_a_sleeper_wakes_up_in_its_page(served: Served, source) -> None:
    served.handler.start()
    assert served.touch(3).result(10) == bytes([4]) * PAGE_SIZE
    served.handler.stop()
    assert source.reads == {3: 1}
    account = served.handler.account
    assert (account.userfault, account.again, account.latency.count) == (1, 0, 1)


def test_two_sleepers_in_a_page_share_one_reading_of_it(served: Served, source) -> None:
    sleepers = [served.touch(3), served.touch(3)]  # both before anybody serves
    assert asleep(sleepers[0])
    served.handler.start()
    assert [sleeper.result(10) for sleeper in sleepers] == 2 * [bytes([4]) * PAGE_SIZE]
    served.handler.stop()
    assert source.reads == {3: 1}
    account = served.handler.account
    assert (account.userfault, account.again) == (2, 1)


def test_a_fault_on_a_page_that_is_in_wakes_its_sleeper(served: Served) -> None:
    # Let in by another thread without a wake-up, as when two vCPUs' faults cross.
    sleeper = served.touch(3)
    assert asleep(sleeper)
    served.ram.bytes[3 * PAGE_SIZE : 4 * PAGE_SIZE] = b"\x04" * PAGE_SIZE
    address = served.ram.guest.address + 3 * PAGE_SIZE
    assert served.view.uffd.continue_(address, PAGE_SIZE, dontwake=True).errno == 0
    assert served.view.uffd.continue_(address, PAGE_SIZE).errno == errno.EEXIST
    assert asleep(sleeper)
    served.handler.start()
    assert sleeper.result(10) == bytes([4]) * PAGE_SIZE


def test_a_failure_leaves_the_sleeper_asleep_and_says_whose_it_is(served: Served, source) -> None:
    source.broken = {3}
    served.handler.start()
    thread_id = served.pool.submit(threading.get_native_id).result()
    sleeper = served.touch(3)
    assert served.failed.wait(10)
    assert asleep(sleeper)
    [(fault, error)] = served.failures
    assert isinstance(error, SourceError)
    assert error.offset == 3 * PAGE_SIZE
    assert fault.address == served.ram.guest.address + 3 * PAGE_SIZE
    assert fault.thread_id == thread_id
    # The others are served as before.
    assert served.touch(5).result(10) == bytes([6]) * PAGE_SIZE


def test_an_unexpected_error_of_a_source_is_reported_too(ram, view) -> None:
    class Wrong:
        size = ram.size

        def read_into(self, offset: int, buffer: memoryview) -> None:
            raise ZeroDivisionError

    served = Served(ram, view, Pager(ram, view, Wrong()))
    served.handler.start()
    served.touch(0)
    assert served.failed.wait(10)
    assert isinstance(served.failures[0][1], ZeroDivisionError)
    served.close()


def test_a_released_sleeper_fails_and_finds_its_page_once_the_source_is_mended(
    served: Served, source
) -> None:
    source.broken = {3}
    served.handler.start()
    sleeper = served.touch(3)
    assert served.failed.wait(10)
    served.handler.release()
    assert sleeper.result(10) is None
    served.handler.stop()
    source.broken.clear()
    served.handler.start()
    assert served.touch(3).result(10) == bytes([4]) * PAGE_SIZE


def test_release_shuts_the_pages_slept_in_and_no_others(served: Served, source) -> None:
    source.broken = {3}
    served.handler.start()
    assert served.touch(2).result(10) is not None
    sleeper = served.touch(3)
    assert served.failed.wait(10)
    served.handler.release()
    assert sleeper.result(10) is None
    assert served.touch(2).result(10) is not None
    assert served.touch(4).result(10) is not None


def test_release_finds_sleepers_whose_faults_nobody_has_read(ram, view, pagemap: Pagemap) -> None:
    # The handler's thread is held up in its source when a second vCPU falls asleep.
    reading, go_on = threading.Event(), threading.Event()

    def read(offset: int, length: int) -> bytes:
        reading.set()
        assert go_on.wait(10)
        return b"\x09" * length

    served = Served(ram, view, Pager(ram, view, FunctionSource(ram.size, read)))
    served.handler.start()
    sleepers = [served.touch(0)]
    assert reading.wait(10)
    sleepers.append(served.touch(1))
    assert asleep(sleepers[1])
    served.handler.release()
    assert [sleeper.result(10) for sleeper in sleepers] == [None, None]
    go_on.set()
    served.handler.stop()
    assert not pagemap.present(ram.guest.address + PAGE_SIZE)
    served.handler.start()
    assert served.touch(0).result(10) == served.touch(1).result(10) == b"\x09" * PAGE_SIZE
    served.close()


def test_stop_while_someone_sleeps_leaves_him_asleep_and_start_serves_him(ram, view) -> None:
    source_works = threading.Event()

    def read(offset: int, length: int) -> bytes:
        if not source_works.is_set():
            raise OSError(errno.EIO, "Input/output error")
        return b"\x09" * length

    served = Served(ram, view, Pager(ram, view, FunctionSource(ram.size, read)))
    served.handler.start()
    sleeper = served.touch(0)
    assert served.failed.wait(10)
    served.handler.stop()
    assert asleep(sleeper)
    served.handler.close()
    served.view.shut()
    assert sleeper.result(10) is None
    served.pool.shutdown()


def test_stopping_twice_and_closing_twice_does_no_harm(served: Served) -> None:
    served.handler.stop()
    served.handler.start()
    served.handler.stop()
    served.handler.stop()
    served.handler.close()
    served.handler.close()


def test_around_a_fault_for_each_thread_by_what_it_did_before(
    ram, view, source, monkeypatch
) -> None:
    monkeypatch.setattr("guestfault.paging.pager.draw", lambda _run, _asked=None: None)
    served = Served(ram, view, Pager(ram, view, source))
    served.handler.close()
    served.handler = UserfaultHandler(
        served.pager, view, served._on_failure, fault_around=8, parts=[range(ram.pages)]
    )
    served.handler.start()
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as other:
        for page in range(8):
            for who, at in ((one, page), (other, 8 + page)):
                address = ram.guest.address + at * PAGE_SIZE
                seen = who.submit(process_memory.read, address, PAGE_SIZE).result(10)
                assert seen == bytes([at + 1]) * PAGE_SIZE
    served.handler.stop()
    assert served.handler.account.userfault == 8  # at 0, 1, 2 and 4, and as many
    assert source.reads == dict.fromkeys(range(16), 1)
    served.close()
