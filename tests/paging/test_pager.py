from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import chain
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestfault.errors import KernelError
from guestfault.linux import process_memory
from guestfault.linux.pagemap import Pagemap
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.view import GuestView, Unpopulated
from guestfault.paging import pager as pager_module
from guestfault.paging.ahead import EVERY, Ahead, AheadCount
from guestfault.paging.pager import Pager
from guestfault.paging.source.base import SourceError
from guestfault.paging.source.function import FunctionSource

PAGES = 16


def content(page: int) -> bytes:
    return bytes([page + 1]) * PAGE_SIZE


def seen_by_the_guest(ram: GuestRam, page: int) -> bytes | None:
    """A page as the kernel reads it on a guest's behalf.  Only of pages that are in."""
    return process_memory.read(ram.guest.address + page * PAGE_SIZE, PAGE_SIZE)


def accessible(view: GuestView, ram: GuestRam, pagemap: Pagemap, page: int) -> bool:
    """Whether the guest can get at a page, found out without bringing it in."""
    address = ram.guest.address + page * PAGE_SIZE
    if view.name == "protected":  # where a page may be in our tables and forbidden
        return process_memory.read(address, 1) is not None
    return pagemap.present(address)


def test_a_page_is_let_in_whole_and_alone(ram, view, source, pagemap) -> None:
    pager = Pager(ram, view, source)
    assert pager.bring_in(5 * PAGE_SIZE + 17)
    assert seen_by_the_guest(ram, 5) == content(5)
    assert [accessible(view, ram, pagemap, page) for page in (4, 5, 6)] == [False, True, False]
    assert [pager.is_in(page * PAGE_SIZE) for page in (4, 5, 6)] == [False, True, False]
    assert pager.pages_in == 1


def test_a_range_brings_in_every_page_that_it_touches(ram, view, source) -> None:
    pager = Pager(ram, view, source)
    assert pager.bring_in_range(3 * PAGE_SIZE - 1, PAGE_SIZE + 2) == 3
    assert pager.bring_in_range(4 * PAGE_SIZE, 2 * PAGE_SIZE) == 1
    assert source.reads == {2: 1, 3: 1, 4: 1, 5: 1}


def test_a_page_that_the_guest_has_written_is_never_filled_again(ram, view, source) -> None:
    pager = Pager(ram, view, source)
    pager.bring_in(0)
    assert process_memory.write(ram.guest.address, b"written by the guest")
    assert not pager.bring_in(0)
    assert seen_by_the_guest(ram, 0)[:20] == b"written by the guest"
    assert source.reads == {0: 1}
    assert pager.pages_in == 1


def test_a_page_that_the_host_dropped_is_let_in_again_without_a_refill(
    ram, view, source, pagemap
) -> None:
    pager = Pager(ram, view, source)
    pager.bring_in(0)
    process_memory.write(ram.guest.address, b"written by the guest")
    ram.guest.discard(0, PAGE_SIZE)
    assert not pagemap.present(ram.guest.address)
    assert not pager.bring_in(0)
    assert seen_by_the_guest(ram, 0)[:20] == b"written by the guest"
    assert source.reads == {0: 1}


def test_a_failing_source_leaves_the_page_absent_and_can_be_mended(
    ram, view, source, pagemap
) -> None:
    pager = Pager(ram, view, source)
    source.broken = {7}
    for _ in range(2):
        with pytest.raises(SourceError) as caught:
            pager.bring_in(7 * PAGE_SIZE)
        assert caught.value.offset == 7 * PAGE_SIZE
        assert not pager.is_in(7 * PAGE_SIZE)
        assert not accessible(view, ram, pagemap, 7)
    assert pager.pages_in == 0
    source.broken.clear()
    assert pager.bring_in(7 * PAGE_SIZE)
    assert seen_by_the_guest(ram, 7) == content(7)


def test_an_error_that_is_kept_does_not_keep_the_memory(source) -> None:
    with GuestRam(PAGES * PAGE_SIZE) as ram:
        source.broken = {1}
        with pytest.raises(SourceError) as caught:
            Pager(ram, Unpopulated(ram), source).bring_in(PAGE_SIZE)
    assert caught.value.__traceback__ is not None  # and yet the RAM was unmapped


def test_a_source_of_another_size_is_refused_before_anything_is_read(ram) -> None:
    with pytest.raises(SourceError, match="it has 4096 bytes, the guest 65536"):
        Pager(ram, Unpopulated(ram), FunctionSource(PAGE_SIZE, lambda *_: b""))


def test_a_page_that_cannot_be_let_in_is_filled_and_not_read_again(ram, source) -> None:
    view = Unpopulated(ram)
    pager = Pager(ram, view, source)
    view.shut()
    with pytest.raises(KernelError, match="MADV_POPULATE_WRITE"):
        pager.bring_in(0)
    view.reopen()
    assert not pager.bring_in(0)
    assert seen_by_the_guest(ram, 0) == content(0)
    assert source.reads == {0: 1}


# -- ahead -------------------------------------------------------------------------------------


def keep(page: int) -> Callable[..., int | None]:
    """A lot that falls on one page whenever it is among those that come in ahead."""
    return lambda run, asked=None: page if page in run and page != asked else None


@pytest.fixture
def none_withheld(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pager_module, "draw", keep(-1))


def test_what_is_absent_of_a_range_comes_in_with_a_read_for_each_run(
    ram, view, source, pagemap, none_withheld
) -> None:
    pager = Pager(ram, view, source)
    pager.bring_in(4 * PAGE_SIZE)
    reads = []

    def read_into(offset: int, buffer: memoryview, read=source.read_into) -> None:
        reads.append((offset // PAGE_SIZE, len(buffer) // PAGE_SIZE))
        read(offset, buffer)

    source.read_into = read_into
    assert pager.bring_in_ahead(2, 6, Ahead.PUSH) == 5
    assert reads == [(2, 2), (5, 3)]
    for page in range(PAGES):
        assert accessible(view, ram, pagemap, page) == (2 <= page < 8)
        assert pager.is_in(page * PAGE_SIZE) == (2 <= page < 8)
    assert all(seen_by_the_guest(ram, page) == content(page) for page in range(2, 8))
    assert pager.bring_in_ahead(2, 6) == 0
    assert pager.bring_in_ahead(2, 0) == 0
    assert (pager.pages_in, pager.ahead, pager.counts[Ahead.PUSH].pages) == (6, 5, 5)


def test_a_withheld_page_is_absent_until_it_is_wanted_and_not_read_again(
    ram, view, source, pagemap, monkeypatch
) -> None:
    monkeypatch.setattr(pager_module, "draw", keep(3))
    pager = Pager(ram, view, source)
    assert pager.bring_in_ahead(0, 8) == 8
    assert [accessible(view, ram, pagemap, page) for page in (2, 3, 4)] == [True, False, True]
    assert pager.is_in(3 * PAGE_SIZE)
    assert pager.counts[Ahead.PREFETCH] == AheadCount(8, 1, 0)
    assert pager.bring_in_ahead(0, 8) == 0
    assert not accessible(view, ram, pagemap, 3)
    assert pager.bring_in(3 * PAGE_SIZE)
    assert seen_by_the_guest(ram, 3) == content(3)
    assert not pager.bring_in(3 * PAGE_SIZE)
    assert pager.counts[Ahead.PREFETCH] == AheadCount(8, 1, 1)
    assert source.reads == dict.fromkeys(range(8), 1)
    assert pager.pages_in == 8


def test_long_runs_are_read_in_parts_of_which_each_may_have_a_page_withheld() -> None:
    with GuestRam(3 * EVERY * PAGE_SIZE) as ram:
        reads: list[int] = []

        def read(_offset: int, length: int) -> bytes:
            reads.append(length // PAGE_SIZE)
            return b"\1" * length

        pager = Pager(ram, Unpopulated(ram), FunctionSource(ram.size, read))
        assert pager.bring_in_ahead(0, ram.pages) == ram.pages
        assert reads == [EVERY] * 3
        assert pager.counts[Ahead.PREFETCH].withheld == 3  # so each of them has one for certain


def test_ahead_fails_and_leaves_what_it_can_get_and_what_others_can(
    ram, view, source, pagemap, none_withheld
) -> None:
    pager = Pager(ram, view, source)
    pager.bring_in(3 * PAGE_SIZE)
    source.broken = {5}
    with pytest.raises(SourceError):
        pager.bring_in_ahead(0, 8)
    ins = [pager.is_in(page * PAGE_SIZE) for page in range(8)]
    assert ins == [True] * 4 + [False] * 4
    assert [accessible(view, ram, pagemap, page) for page in range(8)] == ins
    assert pager.bring_in(4 * PAGE_SIZE)
    assert pager.ahead == 3


@pytest.mark.timeout(60)
def test_who_goes_ahead_waits_for_nobody(ram, none_withheld) -> None:
    """Invariant: a page that somebody is filling is his; ahead passes over it."""
    go_on, began = threading.Event(), threading.Event()

    def read(offset: int, length: int) -> bytes:
        if offset == PAGE_SIZE:
            began.set()
            assert go_on.wait(10)
        return b"\1" * length

    pager = Pager(ram, Unpopulated(ram), FunctionSource(ram.size, read))
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(pager.bring_in, PAGE_SIZE)
        assert began.wait(10)
        assert pager.bring_in_ahead(0, 3) == 2
        assert not slow.done()
        go_on.set()
        assert slow.result()


@pytest.mark.timeout(60)
def test_who_waits_for_a_page_that_fails_ahead_tries_it_alone(ram, none_withheld) -> None:
    """Invariant: nobody who needs a page is stopped by the failure of one that nobody needs."""
    go_on, began, reads = threading.Event(), threading.Event(), []

    def read(offset: int, length: int) -> bytes:
        reads.append(length // PAGE_SIZE)
        if length > PAGE_SIZE:
            began.set()
            assert go_on.wait(10)
            raise OSError(5, "Input/output error")
        return b"\1" * length

    pager = Pager(ram, Unpopulated(ram), FunctionSource(ram.size, read))
    with ThreadPoolExecutor(2) as pool:
        ahead = pool.submit(pager.bring_in_ahead, 0, 4)
        assert began.wait(10)
        asked = pool.submit(pager.bring_in, 2 * PAGE_SIZE)
        time.sleep(0.05)  # for it to come and wait
        go_on.set()
        assert isinstance(ahead.exception(10), SourceError)
        assert asked.result(10)
    assert reads == [4, 1]
    assert [pager.is_in(page * PAGE_SIZE) for page in range(4)] == [False, False, True, False]


# -- many threads ------------------------------------------------------------------------------


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """Call all of them at once, each on a thread of its own."""
    gate = threading.Barrier(len(calls))

    def call(function: Callable[[], Any]) -> Any:
        gate.wait()
        return function()

    with ThreadPoolExecutor(len(calls)) as pool:
        return list(pool.map(call, calls))


@settings(max_examples=25, deadline=None)
@given(st.lists(st.lists(st.integers(0, PAGES - 1), max_size=12), min_size=2, max_size=6))
def test_each_page_is_read_once_and_seen_whole_whoever_asks(asked: list[list[int]]) -> None:
    reads: list[int] = []

    def read(offset: int, length: int) -> bytes:
        reads.append(offset // PAGE_SIZE)
        time.sleep(50e-6)  # let the others in
        return content(offset // PAGE_SIZE)

    with GuestRam(PAGES * PAGE_SIZE) as ram:
        pager = Pager(ram, Unpopulated(ram), FunctionSource(ram.size, read))

        def visit(pages: list[int]) -> list[tuple[int, bool, bytes | None]]:
            return [
                (page, pager.bring_in(page * PAGE_SIZE), seen_by_the_guest(ram, page))
                for page in pages
            ]

        visits = list(chain(*in_threads([partial(visit, pages) for pages in asked])))
        everything = {page for pages in asked for page in pages}
        assert sorted(reads) == sorted(everything)
        assert all(seen == content(page) for page, _, seen in visits)
        assert sorted(page for page, filled, _ in visits if filled) == sorted(everything)
        assert pager.pages_in == len(everything)


def test_nobody_sees_a_page_before_it_is_whole(ram, view, pagemap) -> None:
    half, go_on = threading.Event(), threading.Event()

    class Slow:
        size = ram.size

        def read_into(self, offset: int, buffer: memoryview) -> None:
            buffer[: PAGE_SIZE // 2] = b"\1" * (PAGE_SIZE // 2)
            half.set()
            assert go_on.wait(10)
            buffer[PAGE_SIZE // 2 :] = b"\1" * (PAGE_SIZE // 2)

    pager = Pager(ram, view, Slow())
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(pager.bring_in, 0)
        assert half.wait(10)
        second = pool.submit(lambda: (pager.bring_in(0), seen_by_the_guest(ram, 0)))
        time.sleep(0.02)
        assert not accessible(view, ram, pagemap, 0)
        assert not pager.is_in(0)
        assert not second.done()
        go_on.set()
        assert first.result()
        assert second.result() == (False, content(0))


def test_whoever_waits_for_a_page_that_fails_gets_the_error_of_the_one_attempt(ram) -> None:
    began, go_on, reads = threading.Event(), threading.Event(), []

    def fail(offset: int, length: int) -> bytes:
        reads.append(offset)
        began.set()
        assert go_on.wait(10)
        raise OSError(5, "Input/output error")

    pager = Pager(ram, Unpopulated(ram), FunctionSource(ram.size, fail))
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(pager.bring_in, 0) for _ in range(4)]
        assert began.wait(10)
        time.sleep(0.05)  # for the others to come and wait
        go_on.set()
        errors = [future.exception(10) for future in futures]
    assert all(isinstance(error, SourceError) and error.offset == 0 for error in errors)
    assert reads == [0]
    assert not pager.is_in(0)


def test_a_page_being_filled_does_not_hold_up_another(ram) -> None:
    go_on = threading.Event()

    def read(offset: int, length: int) -> bytes:
        if offset == 0:
            assert go_on.wait(10)
        return bytes([1]) * length

    pager = Pager(ram, Unpopulated(ram), FunctionSource(ram.size, read))
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(pager.bring_in, 0)
        assert pager.bring_in(PAGE_SIZE)
        assert not slow.done()
        go_on.set()
        assert slow.result()
