"""The view of KVM Userfault: a page, and then its bit."""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.linux import process_memory
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.userfault import Userfault
from guestfault.memory.view import Protected

PAGES = 200


class Below:
    """A view that only remembers what it was asked for."""

    name = "a test's"

    def __init__(self) -> None:
        self.asked: list[tuple[object, ...]] = []

    def bring_in(self, offset: int, size: int) -> None:
        self.asked.append(("bring_in", offset, size))

    def shut(self) -> None:
        self.asked.append(("shut",))

    def reopen(self) -> None:
        self.asked.append(("reopen",))

    def close(self) -> None:
        self.asked.append(("close",))


@pytest.fixture(scope="module")
def ram() -> Iterator[GuestRam]:
    with GuestRam(PAGES * PAGE_SIZE) as ram:
        yield ram


def word(address: int) -> int:
    """What KVM reads: 64 bits of userspace."""
    return ctypes.c_uint64.from_address(address).value


def test_every_page_of_every_slot_is_out_at_first(ram: GuestRam) -> None:
    view = Userfault(ram, Below(), [(0, 70 * PAGE_SIZE), (70 * PAGE_SIZE, 130 * PAGE_SIZE)])
    first, second = view.bitmap_of(0), view.bitmap_of(70 * PAGE_SIZE)
    assert second - first == 16  # whole words
    for page in range(PAGES):
        assert view.is_set(page * PAGE_SIZE)
        start, bitmap = (0, first) if page < 70 else (70, second)
        at = page - start
        assert word(bitmap + at // 64 * 8) >> at % 64 & 1
    view.close()


def test_the_page_comes_before_its_bit(ram: GuestRam) -> None:
    bits: list[bool] = []

    class Watching(Below):
        def bring_in(self, offset: int, size: int) -> None:
            bits.append(view.is_set(offset))

    view = Userfault(ram, Watching(), [(0, ram.size)])
    view.bring_in(5 * PAGE_SIZE, PAGE_SIZE)
    assert bits == [True]
    assert not view.is_set(5 * PAGE_SIZE)
    view.close()


def test_a_page_that_cannot_be_let_in_keeps_its_bit(ram: GuestRam) -> None:
    class Failing(Below):
        def bring_in(self, offset: int, size: int) -> None:
            raise OSError(12, "no memory")

    view = Userfault(ram, Failing(), [(0, ram.size)])
    with pytest.raises(OSError, match="no memory"):
        view.bring_in(0, PAGE_SIZE)
    assert view.is_set(0)
    view.close()


@given(st.sets(st.integers(0, PAGES - 1)), st.integers(1, PAGES - 1))
def test_exactly_the_bits_of_what_was_brought_in_are_clear(pages: set[int], cut: int) -> None:
    """Whatever the slots: two of them, split anywhere."""
    with GuestRam(PAGES * PAGE_SIZE) as ram:
        ranges = [(0, cut * PAGE_SIZE), (cut * PAGE_SIZE, (PAGES - cut) * PAGE_SIZE)]
        view = Userfault(ram, Below(), ranges)
        for page in pages:
            view.bring_in(page * PAGE_SIZE, PAGE_SIZE)
        for page in range(PAGES):
            start = 0 if page < cut else cut
            at = page - start
            bit = word(view.bitmap_of(start * PAGE_SIZE) + at // 64 * 8) >> at % 64 & 1
            assert bit == view.is_set(page * PAGE_SIZE) == (page not in pages)
        view.close()


def test_a_range_over_the_edge_of_a_slot(ram: GuestRam) -> None:
    view = Userfault(ram, Below(), [(0, 10 * PAGE_SIZE), (20 * PAGE_SIZE, 10 * PAGE_SIZE)])
    view.bring_in(8 * PAGE_SIZE, 14 * PAGE_SIZE)  # 8 to 21
    out = [page for page in range(30) if view.is_set(page * PAGE_SIZE)]
    assert out == [*range(8), *range(22, 30)]
    view.close()


@pytest.mark.timeout(60)
def test_no_bit_comes_back_when_many_threads_clear_their_own(ram: GuestRam) -> None:
    """The invariant: a bit once cleared stays clear, though its byte is written by others too."""
    view = Userfault(ram, Below(), [(0, ram.size)])
    start = threading.Barrier(4)

    def clear(mine: int) -> None:
        start.wait()
        for page in range(mine, PAGES, 4):
            view.bring_in(page * PAGE_SIZE, PAGE_SIZE)
            assert not view.is_set(page * PAGE_SIZE)

    threads = [threading.Thread(target=clear, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not any(view.is_set(page * PAGE_SIZE) for page in range(PAGES))
    view.close()


def test_the_view_below_does_the_rest(ram: GuestRam) -> None:
    below = Below()
    view = Userfault(ram, below, [(0, ram.size)])
    assert view.name == "KVM Userfault, over a test's"
    view.bring_in(PAGE_SIZE, PAGE_SIZE)
    view.shut()
    view.reopen()
    view.close()
    assert below.asked == [("bring_in", PAGE_SIZE, PAGE_SIZE), ("shut",), ("reopen",), ("close",)]


def test_what_is_out_is_out_for_kvm_itself_too(ram: GuestRam) -> None:
    view = Userfault(ram, Protected(ram), [(0, ram.size)])
    ram.bytes[0] = 7
    assert process_memory.read(ram.guest.address, 1) is None
    view.bring_in(0, PAGE_SIZE)
    assert process_memory.read(ram.guest.address, 1) == b"\7"
    view.close()
