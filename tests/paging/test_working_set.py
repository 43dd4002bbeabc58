"""The order of first touches: as it is recorded, kept, and refused if it is not what was kept."""

from __future__ import annotations

import threading
from itertools import chain

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.view import Unpopulated
from guestfault.paging.pager import Pager
from guestfault.paging.source.base import SourceError
from guestfault.paging.working_set import RecordingSource, WorkingSet, looks_recorded, runs_of

IDENTITY = bytes(range(32))
PAGES = 64

orders = st.lists(st.integers(0, PAGES - 1), unique=True)


def working_set(order: list[int]) -> WorkingSet:
    return WorkingSet(IDENTITY, PAGES, tuple(runs_of(order)))


@given(orders)
@example([3, 2, 1, 0])
@example([63])
def test_what_is_read_is_what_was_written(order: list[int]) -> None:
    written = working_set(order)
    assert list(chain.from_iterable(written.runs)) == order
    assert written.pages == len(order)
    content = written.pack()
    assert looks_recorded(content)
    assert WorkingSet.parse(content) == written


def test_a_walk_straight_on_is_one_run() -> None:
    assert working_set(list(range(PAGES))).runs == (range(PAGES),)
    assert len(working_set(list(range(PAGES))).pack()) == 72 + 8 + 16


@given(orders, st.data())
def test_any_damage_is_found(order: list[int], data: st.DataObject) -> None:
    content = bytearray(working_set(order).pack())
    at = data.draw(st.integers(0, len(content) - 1))
    content[at] ^= data.draw(st.integers(1, 255))
    with pytest.raises(ValueError, match=r"it is|its version|its page size"):
        WorkingSet.parse(bytes(content))


@given(orders, st.integers(0, 200), st.binary(min_size=1, max_size=20))
def test_any_cut_is_found_and_any_addition(order: list[int], cut: int, more: bytes) -> None:
    content = working_set(order).pack()
    for wrong in (content[: min(cut, len(content) - 1)], content + more):
        with pytest.raises(ValueError, match="it is"):
            WorkingSet.parse(wrong)


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(content: bytes) -> None:
    for beginning in (b"", b"guestfault wset\0", b"guestfault wset\0\1\0\0\0\0\x10\0\0"):
        with pytest.raises(ValueError, match="it "):
            WorkingSet.parse(beginning + content)


@pytest.mark.parametrize(
    ("runs", "what"),
    [
        ((range(PAGES, PAGES + 1),), "it has 1 pages from 64 on, of 64"),
        ((range(PAGES - 1, PAGES + 1),), "it has 2 pages from 63 on, of 64"),
        ((range(5, 5),), "it has 0 pages from 5 on"),
        ((range(4, 9), range(2), range(8, 9)), "it has page 8 twice"),
        ((range(4), range(4)), "it has page 0 twice"),
    ],
)
def test_what_no_pager_could_use_is_neither_written_nor_read(runs, what, monkeypatch) -> None:
    bad = WorkingSet(IDENTITY, PAGES, runs)
    with pytest.raises(ValueError, match=what):
        bad.pack()
    monkeypatch.setattr("guestfault.paging.working_set._check", lambda *_: None)
    content = bad.pack()  # as somebody might who can compute a digest
    monkeypatch.undo()
    with pytest.raises(ValueError, match=what):
        WorkingSet.parse(content)


def test_an_identity_of_another_length_is_refused() -> None:
    with pytest.raises(ValueError, match="identity is not 32 bytes"):
        WorkingSet(b"short", PAGES, ()).pack()


# -- recording -------------------------------------------------------------------------------------


def test_the_order_is_that_of_the_first_touches(ram, view, source) -> None:
    recording = RecordingSource(source)
    pager = Pager(ram, view, recording)
    for page in (5, 3, 5, 4, 15, 3, 0):
        pager.bring_in(page * PAGE_SIZE)
    assert recording.runs() == (range(5, 6), range(3, 5), range(15, 16), range(1))


def test_a_page_that_could_not_be_had_at_first_stands_where_it_was_wanted(
    ram, view, source
) -> None:
    recording = RecordingSource(source)
    pager = Pager(ram, view, recording)
    source.broken = {7}
    with pytest.raises(SourceError):
        pager.bring_in(7 * PAGE_SIZE)
    pager.bring_in(2 * PAGE_SIZE)
    source.broken = set()
    pager.bring_in(7 * PAGE_SIZE)
    assert recording.runs() == (range(7, 8), range(2, 3))


@pytest.mark.timeout(30)
def test_threads_share_one_order_with_each_page_once(source) -> None:
    """Each page is in the order once, and each thread's pages in the order that it touched them."""
    recording = RecordingSource(source)
    with GuestRam(source.size) as ram:
        pager = Pager(ram, Unpopulated(ram), recording)
        shares = [list(range(n, ram.pages, 4)) for n in range(4)]
        gate = threading.Barrier(4)

        def touch(pages: list[int]) -> None:
            gate.wait()
            for page in pages:
                pager.bring_in(page * PAGE_SIZE)
                pager.bring_in(0)

        threads = [threading.Thread(target=touch, args=(pages,)) for pages in shares]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        order = list(chain.from_iterable(recording.runs()))
        assert sorted(order) == list(range(ram.pages))
        for pages in shares:
            assert sorted(pages[1:], key=order.index) == pages[1:]
