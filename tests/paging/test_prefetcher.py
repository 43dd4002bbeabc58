"""Pages ahead of demand: all of them, in order, each once; and never in anybody's way."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from itertools import chain, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestfault.linux import process_memory
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.view import Unpopulated
from guestfault.paging.ahead import Ahead
from guestfault.paging.pager import Pager
from guestfault.paging.prefetcher import (
    AS_FAST_AS_IT_GOES,
    GIVES_UP_AFTER,
    READ,
    STRETCH,
    Plan,
    Prefetcher,
    reads,
)
from guestfault.paging.source.base import (
    SourceError,
    SourceInterruptedError,
    SourceUnavailableError,
)
from guestfault.paging.source.interrupt import Interrupt, WaitInterrupted
from guestfault.paging.source.resilient import Patience, ResilientSource
from guestfault.paging.working_set import runs_of

pytestmark = pytest.mark.timeout(30)

PAGES = 256


class PageNumbers:
    """Page n is all of the byte n; what is asked of it, in order, by whom; ``how`` may raise."""

    size = PAGES * PAGE_SIZE

    def __init__(self, how: Callable[[int, int], None] = lambda first, pages: None) -> None:
        self.how = how
        self.asked: list[range] = []
        self._interrupt = Interrupt()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        first, pages = offset // PAGE_SIZE, len(buffer) // PAGE_SIZE
        self.asked.append(range(first, first + pages))
        self.how(first, pages)
        for n in range(pages):
            buffer[n * PAGE_SIZE : (n + 1) * PAGE_SIZE] = bytes([first + n]) * PAGE_SIZE

    def stall(self, first: int, pages: int) -> None:
        """As a server does that never answers."""
        try:
            self._interrupt.sleep(600)
        except WaitInterrupted:
            raise SourceInterruptedError(first, pages) from None

    def interrupt(self) -> None:
        self._interrupt.set()

    def resume(self) -> None:
        self._interrupt.clear()


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam(PAGES * PAGE_SIZE) as ram:
        yield ram


def run_to_its_end(prefetcher: Prefetcher) -> None:
    prefetcher.start()
    for thread in prefetcher._threads:
        thread.join()
    prefetcher.stop()


def everything_is_right(ram: GuestRam, pages: range = range(PAGES)) -> bool:
    return all(
        ram.bytes[n * PAGE_SIZE : (n + 1) * PAGE_SIZE] == bytes([n]) * PAGE_SIZE for n in pages
    )


# -- which reads -----------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 2000), unique=True, max_size=3 * STRETCH))
def test_the_reads_bring_in_each_page_once_and_none_is_long(order: list[int]) -> None:
    made = list(reads(runs_of(order)))
    assert sorted(chain.from_iterable(made)) == sorted(order)
    assert all(0 < len(read) <= READ for read in made)
    # None comes later than a stretch after its place.
    done = 0
    for read in made:
        assert all(abs(order.index(page) - done) < 2 * STRETCH for page in read)
        done += len(read)


def test_a_straight_walk_is_read_in_long_pieces() -> None:
    assert list(reads([range(100)])) == [range(32), range(32, 64), range(64, 96), range(96, 100)]


def test_two_walks_side_by_side_are_told_apart() -> None:
    order = chain.from_iterable(zip(range(64), range(1000, 1064), strict=True))
    found = list(reads(range(page, page + 1) for page in order))
    assert found == [range(32), range(32, 64), range(1000, 1032), range(1032, 1064)]


def test_a_walk_that_jumps_about_is_read_in_its_order() -> None:
    assert [read.start for read in reads(runs_of([9, 4, 7, 1]))] == [9, 4, 7, 1]


# -- what comes in ---------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 4])
def test_the_pages_of_the_order_come_in_and_no_other(ram, threads) -> None:
    source = PageNumbers()
    pager = Pager(ram, Unpopulated(ram), source)
    prefetcher = Prefetcher(pager, Plan([range(40, 90), range(7, 8)], threads))
    run_to_its_end(prefetcher)
    wanted = {*range(40, 90), 7}
    assert {page for page in range(PAGES) if pager.is_in(page * PAGE_SIZE)} == wanted
    assert pager.counts[Ahead.PREFETCH].pages == pager.pages_in == prefetcher.account.planned == 51
    assert pager.counts[Ahead.PUSH].pages == 0
    assert everything_is_right(ram, range(40, 90))


def test_the_push_comes_after_the_order_and_brings_in_the_rest(ram) -> None:
    source = PageNumbers()
    pager = Pager(ram, Unpopulated(ram), source)
    pager.bring_in(33 * PAGE_SIZE)
    run_to_its_end(Prefetcher(pager, Plan([range(200, 210)], push=AS_FAST_AS_IT_GOES)))
    assert pager.counts[Ahead.PREFETCH].pages == 10
    assert pager.counts[Ahead.PUSH].pages == PAGES - 11
    assert everything_is_right(ram)
    assert source.asked[1] == range(200, 210)
    pushed = source.asked[2:]
    assert pushed == sorted(pushed, key=lambda read: read.start)


def test_the_push_keeps_to_its_rate(ram) -> None:
    pager = Pager(ram, Unpopulated(ram), PageNumbers())
    prefetcher = Prefetcher(pager, Plan(push=PAGES * PAGE_SIZE / 0.4))
    began = time.monotonic()
    run_to_its_end(prefetcher)
    assert 0.35 < time.monotonic() - began < 2
    assert pager.counts[Ahead.PUSH].pages == PAGES


def test_the_push_makes_room_for_who_asks(ram) -> None:
    """A page on demand does not queue behind the push, and while there is demand the push rests."""
    by: dict[str, list[tuple[float, float]]] = {"pushing": [], "asking": []}

    def how(first: int, pages: int) -> None:
        began = time.monotonic()
        who = "asking" if threading.current_thread() is threading.main_thread() else "pushing"
        time.sleep(0.03 if who == "pushing" else 0.005)
        by[who].append((began, time.monotonic()))

    pager = Pager(ram, Unpopulated(ram), PageNumbers(how))
    prefetcher = Prefetcher(pager, Plan(push=AS_FAST_AS_IT_GOES))
    prefetcher.start()
    for page in reversed(range(PAGES)):
        if not prefetcher._threads[0].is_alive():
            break
        pager.bring_in(page * PAGE_SIZE)
    prefetcher.stop()
    assert len(by["pushing"]) <= 8
    rests = [after[0] - before[1] for before, after in pairwise(by["pushing"])]
    assert min(rests[:4]) > 0.025  # each is as long as the read before it, which took 0.03
    overlap = [a for a in by["asking"] for p in by["pushing"] if p[0] < a[0] < p[1]]
    assert overlap  # a page was being read for who asked, while others were pushed
    assert everything_is_right(ram)


@pytest.mark.timeout(60)
@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.integers(0, PAGES - 1), unique=True),
    st.lists(st.lists(st.integers(0, PAGES - 1), max_size=30), min_size=1, max_size=4),
    st.integers(1, 6),
    st.booleans(),
)
def test_whoever_asks_meanwhile_each_page_is_read_once_and_right(
    order: list[int], asked: list[list[int]], threads: int, push: bool
) -> None:
    """Memory equals the source, and no page is read twice: a second read could undo a write."""
    source = PageNumbers(lambda first, pages: time.sleep(20e-6))
    with GuestRam(PAGES * PAGE_SIZE) as ram:
        pager = Pager(ram, Unpopulated(ram), source)
        plan = Plan(tuple(runs_of(order)), threads, AS_FAST_AS_IT_GOES if push else None)
        prefetcher = Prefetcher(pager, plan)
        wrong: list[int] = []

        def touch(pages: list[int]) -> None:
            for page in pages:
                pager.bring_in(page * PAGE_SIZE)
                if process_memory.read(ram.guest.address + page * PAGE_SIZE, 1) != bytes([page]):
                    wrong.append(page)

        prefetcher.start()
        touching = [threading.Thread(target=touch, args=(pages,)) for pages in asked]
        for thread in touching:
            thread.start()
        for thread in touching + prefetcher._threads:
            thread.join()
        prefetcher.stop()
        assert not wrong
        read = sorted(chain.from_iterable(source.asked))
        expected = set(order).union(*asked)
        assert read == (list(range(PAGES)) if push else sorted(expected))
        assert everything_is_right(ram, expected)
        assert pager.pages_in == len(read)
        assert sum(map(len, source.asked)) == pager.pages_in


# -- what fails, and the end -----------------------------------------------------------------------


def test_a_page_that_cannot_be_had_is_left_to_demand(ram) -> None:
    broken = {50}

    def how(first: int, pages: int) -> None:
        if broken.intersection(range(first, first + pages)):
            raise SourceError(first * PAGE_SIZE, pages * PAGE_SIZE, "gone")

    pager = Pager(ram, Unpopulated(ram), PageNumbers(how))
    prefetcher = Prefetcher(pager, Plan([range(PAGES)], threads=1))
    run_to_its_end(prefetcher)
    assert (prefetcher.account.failed, prefetcher.account.gave_up) == (1, False)
    assert pager.pages_in == PAGES - READ
    pager.bring_in(51 * PAGE_SIZE)  # a neighbour of the one that is gone
    with pytest.raises(SourceError, match="gone"):
        pager.bring_in(50 * PAGE_SIZE)
    broken.clear()
    pager.bring_in(50 * PAGE_SIZE)
    assert everything_is_right(ram, range(50, 52))


def test_a_source_that_is_gone_for_good_is_not_asked_for_ever(ram, monkeypatch) -> None:
    monkeypatch.setattr("guestfault.paging.prefetcher._FIRST_PAUSE", 0.001)

    def how(first: int, pages: int) -> None:
        raise SourceUnavailableError(first * PAGE_SIZE, pages * PAGE_SIZE, "refused")

    source = PageNumbers(how)
    pager = Pager(ram, Unpopulated(ram), source)
    prefetcher = Prefetcher(pager, Plan(tuple(range(n, n + 1) for n in range(0, 256, 2)), 2, 1e9))
    run_to_its_end(prefetcher)
    assert prefetcher.account.gave_up
    assert GIVES_UP_AFTER <= len(source.asked) <= GIVES_UP_AFTER + 1
    source.how = lambda first, pages: None
    run_to_its_end(prefetcher)  # somebody has mended it, and the session goes on
    assert not prefetcher.account.gave_up
    assert everything_is_right(ram)


def test_an_outage_is_waited_for_with_the_patience_of_the_source(ram) -> None:
    back_at = time.monotonic() + 0.3

    def how(first: int, pages: int) -> None:
        if time.monotonic() < back_at:
            raise SourceUnavailableError(first * PAGE_SIZE, pages * PAGE_SIZE, "refused")

    patient = ResilientSource(PageNumbers(how), Patience(10, first=0.01, limit=0.02))
    prefetcher = Prefetcher(Pager(ram, Unpopulated(ram), patient), Plan([range(PAGES)]))
    run_to_its_end(prefetcher)
    assert prefetcher.account.failed == 0
    assert everything_is_right(ram)


@pytest.mark.parametrize("plan", [Plan([range(PAGES)]), Plan(push=1e6)])
def test_it_stops_at_once_and_leaves_no_thread_and_no_claim(ram, plan) -> None:
    """Stopping ends a read that would never end; its pages are absent, and can be asked for."""
    source = PageNumbers()
    source.how = source.stall
    pager = Pager(ram, Unpopulated(ram), source)
    before = threading.active_count()
    prefetcher = Prefetcher(pager, plan)
    for _ in range(2):
        prefetcher.start()
        while not source.asked:
            time.sleep(0.001)
        began = time.monotonic()
        prefetcher.stop()
        assert time.monotonic() - began < 0.5
        assert threading.active_count() == before
        source.asked.clear()
    prefetcher.stop()
    assert pager.pages_in == 0
    source.how = lambda first, pages: None
    for page in range(PAGES):
        assert pager.bring_in(page * PAGE_SIZE)
    assert everything_is_right(ram)


def test_a_push_at_a_walking_pace_is_stopped_at_once(ram) -> None:
    prefetcher = Prefetcher(Pager(ram, Unpopulated(ram), PageNumbers()), Plan(push=1))
    prefetcher.start()
    time.sleep(0.02)
    began = time.monotonic()
    prefetcher.stop()
    assert time.monotonic() - began < 0.5


def test_an_error_of_another_kind_does_not_end_a_thread_in_silence(ram, monkeypatch) -> None:
    monkeypatch.setattr("guestfault.paging.prefetcher._FIRST_PAUSE", 0.001)

    def how(first: int, pages: int) -> None:
        raise ZeroDivisionError

    prefetcher = Prefetcher(Pager(ram, Unpopulated(ram), PageNumbers(how)), Plan([range(PAGES)]))
    run_to_its_end(prefetcher)
    assert prefetcher.account.gave_up or prefetcher.account.failed == PAGES // READ
