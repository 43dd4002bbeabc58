"""Fault-around: what comes in with a page, and that nothing else is any different."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import chain

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestfault.errors import KernelError
from guestfault.linux import process_memory
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.slots import MemorySlot, SlotMap
from guestfault.memory.view import Unpopulated
from guestfault.paging import pager as pager_module
from guestfault.paging.ahead import Ahead
from guestfault.paging.around import OFF, FaultAround, slot_pages
from guestfault.paging.pager import Pager
from guestfault.paging.source.base import SourceError, SourceInterruptedError
from guestfault.paging.source.zero import ZeroSource

PAGES = 256


@pytest.fixture(autouse=True)
def none_withheld(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pager_module, "draw", lambda _run, _asked=None: None)


@pytest.fixture
def pager() -> Iterator[Pager]:
    with GuestRam(PAGES * PAGE_SIZE) as ram:
        yield Pager(ram, Unpopulated(ram), ZeroSource(ram.size))


def around(pager: Pager, limit: int = 16, *parts: range) -> FaultAround:
    return FaultAround(pager, limit, parts or (range(pager.ram.pages),))


def faults(pager: Pager, walk: list[int], *who: FaultAround) -> list[tuple[int, int]]:
    """Go over pages; for each fault on the way its page, and how many came in with it."""
    met = []
    for n, page in enumerate(walk):
        if not pager.is_in(page * PAGE_SIZE):
            before = pager.pages_in
            assert who[n % len(who)].bring_in(page * PAGE_SIZE)
            met.append((page, pager.pages_in - before))
    return met


@pytest.mark.parametrize("limit", [2, 16])
def test_windows_grow_as_a_guest_goes_on(pager, limit) -> None:
    met = faults(pager, list(range(PAGES)), around(pager, limit))
    sizes = [1, 1, *[2] * 127] if limit == 2 else [1, 1, 2, 4, 8, *[16] * 15]
    assert [size for _, size in met] == sizes
    assert pager.pages_in == PAGES
    assert pager.counts[Ahead.AROUND].pages == PAGES - len(met)


def test_it_makes_no_difference_which_way(pager) -> None:
    met = faults(pager, list(reversed(range(PAGES))), around(pager))
    assert [size for _, size in met] == [1, 1, 2, 4, 8, *[16] * 15]


def test_who_jumps_about_gets_what_he_asks_for(pager) -> None:
    walk = [page * 27 % PAGES for page in range(PAGES)]  # 27 has no divisor in common with 256
    met = faults(pager, walk[: PAGES // 2], around(pager))
    assert [size for _, size in met] == [1] * (PAGES // 2)
    assert pager.ahead == 0


def test_off_is_off(pager) -> None:
    met = faults(pager, list(range(PAGES)), around(pager, OFF))
    assert met == [(page, 1) for page in range(PAGES)]


def test_a_copy_from_one_place_to_another_is_two_streams(pager) -> None:
    walk = list(chain.from_iterable(zip(range(32), range(128, 160), strict=True)))
    met = faults(pager, walk, around(pager))
    assert len(met) == 2 * 6
    assert max(size for _, size in met) == 16


def test_a_stream_outlives_what_jumps_about_beside_it(pager) -> None:
    jumps = [100 + 27 * n % 150 for n in range(40)]
    walk = list(chain.from_iterable(zip(range(40), jumps, strict=True)))
    met = faults(pager, walk, around(pager))
    assert [page for page, size in met if size > 1] == [2, 4, 8, 16, 32]


def test_a_turn_makes_the_window_small_again(pager) -> None:
    one = around(pager)
    faults(pager, list(range(16)), one)
    assert faults(pager, [25, 34], one) == [(25, 1), (34, 1)]
    assert faults(pager, [20], one) == [(20, 4)]  # not far from where it was
    assert faults(pager, [60], one) == [(60, 1)]


def test_windows_are_aligned_and_end_where_their_slot_does(pager) -> None:
    parts = range(5, 27), range(27, 40)
    met = faults(pager, list(range(5, 40)), around(pager, 16, *parts))
    assert met == [(5, 1), (6, 2), (8, 4), (12, 4), (16, 11), (27, 5), (32, 8)]
    assert pager.pages_in == 35


def test_a_page_of_no_slot_comes_in_alone(pager) -> None:
    met = faults(pager, list(range(8)), around(pager, 16, range(16, 32)))
    assert met == [(page, 1) for page in range(8)]


def test_a_window_stops_at_what_is_in_already(pager) -> None:
    one = around(pager)
    faults(pager, list(range(16)), one)
    pager.bring_in(24 * PAGE_SIZE)
    assert faults(pager, list(range(16, 32)), one) == [(16, 8), (25, 7)]


def test_a_guest_that_is_followed_by_another(pager) -> None:
    """It finds a part in, and what is in does not end its stream."""
    faults(pager, [0, 1, 2, 4, 21, 22, 24], around(pager))
    met = faults(pager, list(range(PAGES)), around(pager))
    assert [size for _, size in met[-12:]] == [16] * 12


@pytest.mark.parametrize("limit", [0, -1, 3, 24])
def test_a_limit_that_cannot_be(pager, limit) -> None:
    with pytest.raises(ValueError, match="not a power of two"):
        around(pager, limit)


def test_the_pages_that_slots_show() -> None:
    slots = SlotMap()
    base = 0x7F0000000000
    slots.add(MemorySlot(gpa=0, size=4 * PAGE_SIZE, hva=base + 8 * PAGE_SIZE, slot=0))
    slots.add(MemorySlot(gpa=1 << 32, size=8 * PAGE_SIZE, hva=base, slot=1))
    assert slot_pages(slots, base) == [range(8, 12), range(8)]


# -- a withheld page -----------------------------------------------------------------------------


def test_a_withheld_page_does_not_disturb_its_stream(pager, monkeypatch) -> None:
    monkeypatch.setattr(
        pager_module, "draw", lambda run, asked: next((p for p in run if p != asked), None)
    )
    one = around(pager)
    met, count = [], pager.counts[Ahead.AROUND]
    let_in: set[int] = set()
    for page in range(PAGES):
        if page not in let_in:
            before, withheld = pager.pages_in, count.withheld
            assert one.bring_in(page * PAGE_SIZE)
            came = range(page, page + pager.pages_in - before) or range(page, page + 1)
            met.append((page, pager.pages_in - before))
            let_in.update(came if count.withheld == withheld else (page, *came[2:]))
    assert [size for _, size in met if size] == [1, 1, 2, 4, 8, *[16] * 15]
    assert [page for page, size in met if not size] == [3, 5, 9, *range(17, PAGES, 16)]
    assert (count.withheld, count.wanted, count.useful) == (18, 18, 1.0)


# -- a source that fails -------------------------------------------------------------------------


@pytest.fixture
def grown(ram, view, source):
    """A guest that has gone on far enough to get eight pages at a time."""
    pager = Pager(ram, view, source)
    one = around(pager)
    assert faults(pager, list(range(8)), one)[-1] == (4, 4)
    return pager, one, source


def test_a_page_whose_neighbour_cannot_be_had_comes_in_alone(grown) -> None:
    pager, one, source = grown
    source.broken = {11}
    for page in (8, 9, 10):
        assert one.bring_in(page * PAGE_SIZE)
        assert pager.ram.bytes[page * PAGE_SIZE] == page + 1
        assert not pager.is_in(11 * PAGE_SIZE)
    with pytest.raises(SourceError):
        one.bring_in(11 * PAGE_SIZE)
    assert not pager.is_in(11 * PAGE_SIZE)
    source.broken = set()
    assert one.bring_in(11 * PAGE_SIZE)


def test_an_interrupted_read_is_not_tried_again(grown) -> None:
    pager, one, _ = grown
    reads = []

    def read_into(offset, buffer) -> None:
        reads.append(len(buffer))
        raise SourceInterruptedError(offset, len(buffer))

    pager.source.read_into = read_into
    with pytest.raises(SourceInterruptedError):
        one.bring_in(8 * PAGE_SIZE)
    assert reads == [8 * PAGE_SIZE]
    assert not any(pager.is_in(page * PAGE_SIZE) for page in range(8, 16))


def test_a_view_that_lets_only_one_page_in(grown, monkeypatch) -> None:
    """As after a stop, which parts the mapping where somebody slept."""
    pager, one, source = grown
    let_in = pager.view.bring_in

    def bring_in(offset: int, size: int) -> None:
        if size > PAGE_SIZE:
            raise KernelError("UFFDIO_CONTINUE", 2, "a range in two mappings")
        let_in(offset, size)

    monkeypatch.setattr(pager.view, "bring_in", bring_in)
    for page in range(8, 16):
        one.bring_in(page * PAGE_SIZE)
        seen = process_memory.read(pager.ram.guest.address + page * PAGE_SIZE, 1)
        assert seen == bytes([page + 1])
    assert all(n == 1 for n in source.reads.values())


# -- many threads --------------------------------------------------------------------------------

SMALL = 32


class Source:
    """Page n is all of the byte n + 1; the ``broken`` ones cannot be had.  Counts what it gave."""

    size = SMALL * PAGE_SIZE

    def __init__(self, broken: set[int]) -> None:
        self.broken = broken
        self.given: list[int] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        pages = range(offset // PAGE_SIZE, (offset + len(buffer)) // PAGE_SIZE)
        for n, page in enumerate(pages):
            if page in self.broken:
                raise SourceError(offset, len(buffer), "gone")
            buffer[n * PAGE_SIZE : (n + 1) * PAGE_SIZE] = bytes([page + 1]) * PAGE_SIZE
        self.given += pages


walks = st.one_of(
    st.lists(st.integers(0, SMALL - 1), max_size=24),
    st.tuples(st.integers(0, SMALL - 1), st.integers(1, SMALL)).map(
        lambda t: list(range(SMALL))[t[0] : t[0] + t[1]]
    ),
)


@pytest.mark.timeout(120)
@settings(max_examples=60, deadline=None)
@given(
    st.lists(walks, min_size=1, max_size=4),
    st.lists(st.tuples(st.integers(0, SMALL - 1), st.integers(0, SMALL)), max_size=4),
    st.sampled_from([1, 2, 8, 16]),
    st.sets(st.integers(0, SMALL - 1), max_size=3),
    st.booleans(),
    st.booleans(),
)
def test_every_page_is_filled_once_whoever_asks_and_however(
    asked, ahead, limit, broken, withholding, sharing
) -> None:
    """Invariant: what is asked for is there, once read and right, if it can be had by itself.

    Whatever else is brought in around it or ahead of it meanwhile, by whichever threads.
    """
    source = Source(broken)
    with GuestRam(source.size) as ram, pytest.MonkeyPatch.context() as patch:
        if withholding:
            patch.setattr(
                pager_module,
                "draw",
                lambda run, asked=None: next((p for p in reversed(run) if p != asked), None),
            )
        pager = Pager(ram, Unpopulated(ram), source)
        if sharing:
            claims = pytest.importorskip("guestfault.paging.claims")
            pager.share(claims.SharedClaims)

        def walk(pages: list[int]) -> None:
            one = FaultAround(pager, limit, (range(SMALL // 2), range(SMALL // 2, SMALL)))
            for page in pages:
                if page in broken:
                    with pytest.raises(SourceError):
                        one.bring_in(page * PAGE_SIZE)
                    continue
                one.bring_in(page * PAGE_SIZE)
                seen = process_memory.read(ram.guest.address + page * PAGE_SIZE, PAGE_SIZE)
                assert seen == bytes([page + 1]) * PAGE_SIZE

        def go_ahead(first: int, pages: int) -> None:
            try:
                pager.bring_in_ahead(first, min(pages, SMALL - first))
            except SourceError:
                assert broken & set(range(first, first + pages))

        with ThreadPoolExecutor(len(asked) + len(ahead) or 1) as pool:
            futures = [pool.submit(walk, pages) for pages in asked]
            futures += [pool.submit(go_ahead, *reach) for reach in ahead]
            for future in futures:
                future.result(60)
        filled = {page for page in range(SMALL) if pager.is_in(page * PAGE_SIZE)}
        assert len(source.given) == len(set(source.given))
        assert filled == set(source.given)
        assert filled >= set(chain.from_iterable(asked)) - broken
        assert not filled & broken
        assert pager.pages_in == len(filled)
        for page in filled:
            at = page * PAGE_SIZE
            assert bytes(ram.bytes[at : at + PAGE_SIZE]) == bytes([page + 1]) * PAGE_SIZE
        for count in pager.counts.values():
            assert 0 <= count.wanted <= count.withheld <= count.pages
        if limit == OFF:
            assert pager.counts[Ahead.AROUND].pages == 0
