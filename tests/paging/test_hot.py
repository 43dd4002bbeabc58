"""The compiled loop's parts against the plain ones that they must agree with."""

from __future__ import annotations

import ctypes
import struct
import threading
from mmap import PAGESIZE

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("numba", reason="numba is not installed: pip install 'guestfault[fast]'")

import numpy as np

from guestfault.fault.locate.run_trace import RunTrace, Sentence
from guestfault.linux.perf_ring import HEAD_OFFSET, OverwriteRing
from guestfault.linux.tracefs import EventFormat
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.slots import MemorySlot, SlotMap
from guestfault.memory.view import Registered
from guestfault.paging import hot, hot_around
from guestfault.paging import hot_words as at
from guestfault.paging.ahead import IN
from guestfault.paging.around import FaultAround, slot_pages
from guestfault.paging.claims import SharedClaims
from guestfault.paging.histogram import BUCKETS, LatencyHistogram
from guestfault.paging.hot_loop import blank_words, describe_memory, describe_trace
from guestfault.paging.pager import Pager
from guestfault.paging.source.function import FunctionSource
from guestfault.uapi import kvm as uapi
from guestfault.uapi import perf
from guestfault.x86.paging import AccessKind, Translation, walk
from guestfault.x86.tables import SIZE_1G, SIZE_2M, Mapping, PagingMode, TableBuilder

U64 = (1 << 64) - 1


# -- the trace -----------------------------------------------------------------------------------


def event(name: str, number: int, **fields: tuple[int, int, int]) -> EventFormat:
    lines = [
        f"\tfield:int {field};\toffset:{offset};\tsize:{size};\tsigned:{signed};"
        for field, (offset, size, signed) in {"common_type": (0, 2, 0), **fields}.items()
    ]
    return EventFormat.parse("\n".join([f"name: {name}", f"ID: {number}", "format:", *lines]))


FORMATS = {
    e.name: e
    for e in (
        event("kvm_userspace_exit", 11, reason=(8, 4, 0), errno=(12, 4, 1)),
        event("kvm_fpu", 12, load=(8, 4, 0)),
        event("kvm_entry", 13),
        event("kvm_mmu_spte_requested", 14),
        event("kvm_page_fault", 15, fault_address=(24, 8, 0), error_code=(32, 8, 0)),
        event("kvm_mmu_pagetable_walk", 16, addr=(8, 8, 0), pferr=(16, 4, 0)),
    )
}


class Locator:
    """What the loop is told of a locator: its ring, how it is read, what the numbers are."""

    class Meaning:
        is_gva = False

    meanings = {"kvm_page_fault": Meaning(), "kvm_mmu_pagetable_walk": Meaning()}

    def __init__(self, memory: memoryview) -> None:
        self.trace = RunTrace.__new__(RunTrace)
        self.trace.formats = FORMATS
        self.trace.sentence = Sentence.of(FORMATS)
        self.trace.ring = OverwriteRing(memory)


def record(number: int, word: int, size: int, address: int, type_: int) -> bytes:
    body = bytearray(size)
    struct.pack_into("<H", body, 0, number)
    struct.pack_into("<i", body, 12, word)
    struct.pack_into("<Q", body, 24, address)
    if number == 16:
        struct.pack_into("<Q", body, 8, address)
    return struct.pack("<IHHI", type_, 0, 12 + size, size) + body


records = st.builds(
    record,
    st.sampled_from([11, 12, 13, 14, 15, 16, 15, 16, 77]),
    st.sampled_from([-14, -14, -14, 0, -4, -133]),
    st.sampled_from([44, 52, 60]),
    st.integers(0, U64),
    st.sampled_from([perf.PERF_RECORD_SAMPLE] * 9 + [2]),
)


@settings(deadline=None)
@given(st.lists(records, max_size=12), st.integers(0, 63), st.sampled_from([256, 4096]))
def test_the_trace_is_read_as_the_plain_reader_reads_it(oldest_first, start, size) -> None:
    """Wrapped, overwritten, lost and strange records: an answer is the plain one's, or none."""
    memory = bytearray(PAGESIZE + size)
    head = -8 * start
    for each in oldest_first:
        head -= len(each)
        for i, byte in enumerate(each):
            memory[PAGESIZE + (head + i) % size] = byte
    # The kernel counts from 0; what was before the first record is a record that is no sample.
    struct.pack_into("<Q", memory, HEAD_OFFSET, head & U64)
    locator = Locator(memoryview(memory))
    words = blank_words(0)
    describe_trace(words, locator)
    words[at.KVM_RUN_AT] = ctypes.addressof(run := uapi.kvm_run())
    found = hot.failed_gpa(words)
    plain = locator.trace.sentence.read(locator.trace.ring)
    del run
    if words[at.FOUND_GVA] == 0:
        assert plain, "the loop has an answer where the plain reader has none"
        assert found & U64 == plain[0].number
    elif plain:
        newest = oldest_first[-1]
        # What it leaves to Python: something after the exit, another errno, no sample.
        is_exit = newest[12] == 11
        assert (
            not is_exit
            or struct.unpack_from("<i", newest, 24)[0] != -14
            or any(r[0] != perf.PERF_RECORD_SAMPLE for r in oldest_first)
        )


@pytest.mark.parametrize(
    ("size", "gpa", "known"), [(4096, 0x5000, True), (8192, 0x5000, False), (0, 0x5000, False)]
)
def test_an_annotation_is_believed_if_it_is_of_one_page(size, gpa, known) -> None:
    run = uapi.kvm_run()
    run.exit_reason = 39
    run.memory_fault.gpa, run.memory_fault.size = gpa, size
    words = blank_words(0)
    words[at.KVM_RUN_AT], words[at.FAULT_EXIT] = ctypes.addressof(run), 39
    assert hot.failed_gpa(words) == (gpa if known else -1)
    words[at.FAULT_EXIT] = 38
    assert hot.failed_gpa(words) == -1


# -- the guest's tables --------------------------------------------------------------------------


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from([PagingMode.FOUR_LEVEL, PagingMode.FIVE_LEVEL]),
    st.lists(st.integers(0, 1 << 33), min_size=1, max_size=8),
    st.booleans(),
)
def test_a_gva_is_translated_as_the_processor_would(mode, gvas, all_filled) -> None:
    tables = TableBuilder(mode, first_table=0)
    tables.map(Mapping(gva=1 << 32, gpa=0x1000, length=16 * PAGE_SIZE, user=True))
    tables.map(Mapping(gva=3 * SIZE_1G, gpa=SIZE_2M, length=SIZE_2M, page_size=SIZE_2M))
    tables.map(Mapping(gva=7 * SIZE_1G, gpa=SIZE_1G, length=SIZE_1G, page_size=SIZE_1G))
    image, state = tables.image(), tables.state
    with GuestRam(32 * PAGE_SIZE) as ram:
        ram.bytes[: len(image)] = image
        slots = SlotMap()
        slots.add(MemorySlot(0, ram.size, ram.guest.address, 0))
        words = blank_words(1)
        describe_memory(words, ram, slots)
        filled = bytearray(b"\1" * ram.pages) if all_filled else bytearray(ram.pages)
        claims = SharedClaims(filled, ())
        words[at.FILLED_AT] = claims.filled_at
        run = uapi.kvm_run()
        s = run.s.regs.sregs
        s.cr0, s.cr3, s.cr4, s.efer = state.cr0, state.cr3, state.cr4, state.efer
        words[at.KVM_RUN_AT] = ctypes.addressof(run)

        def read_entry(gpa: int, size: int) -> int | None:
            inside = gpa + size <= ram.size
            return int.from_bytes(ram.bytes[gpa : gpa + size], "little") if inside else None

        for gva in [*gvas, (1 << 32) + 0x1123, 3 * SIZE_1G + 0x12345, 7 * SIZE_1G + 0x1234567]:
            expected = walk(state, gva, AccessKind.READ, False, read_entry)
            gpa = expected.gpa if isinstance(expected, Translation) and all_filled else -1
            assert hot.translate(words, gva) == gpa


def test_without_long_mode_python_translates() -> None:
    words = blank_words(0)
    run = uapi.kvm_run()
    words[at.KVM_RUN_AT] = ctypes.addressof(run)
    assert hot.translate(words, 0x1000) == -1


# -- claims --------------------------------------------------------------------------------------


@pytest.mark.timeout(60)
def test_of_many_threads_one_wins_a_page() -> None:
    """Invariant: a page is filled by one, whoever claims it at the same time."""
    pages = 20_000
    claims = SharedClaims(bytearray(pages), (7,))
    won: list[list[int]] = [[] for _ in range(4)]
    start = threading.Barrier(4)

    def claim(n: int) -> None:
        start.wait()
        won[n] = [page for page in range(pages) if claims.take(page)]

    threads = [threading.Thread(target=claim, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    everybodys = sorted(page for each in won for page in each)
    assert everybodys == [page for page in range(pages) if page != 7]
    claims.give_up(7)
    assert claims.take(7)
    assert not claims.take(7)


@pytest.mark.timeout(60)
def test_python_waits_for_a_page_that_a_loop_is_filling(ram, view) -> None:
    """Invariant: a page that a loop has claimed is not read again, and not let in half filled."""
    reads: list[int] = []

    def read(offset: int, length: int) -> bytes:
        reads.append(offset)
        return b"\x11" * length

    pager = Pager(ram, view, FunctionSource(ram.size, read))
    claims = pager.share(SharedClaims)
    assert claims.take(3)
    asked = threading.Thread(target=pager.bring_in, args=(3 * PAGE_SIZE,))
    asked.start()
    asked.join(0.1)
    assert asked.is_alive()
    ram.bytes[3 * PAGE_SIZE : 4 * PAGE_SIZE] = b"\x22" * PAGE_SIZE
    ctypes.c_uint8.from_address(claims.filled_at + 3).value = 1
    asked.join(10)
    assert not asked.is_alive()
    assert reads == []
    assert pager.is_in(3 * PAGE_SIZE)
    # One that the loop gives up is Python's.
    assert claims.take(4)
    claims.give_up(4)
    assert pager.bring_in(4 * PAGE_SIZE)
    assert not claims.take(4)
    assert pager.pages_in == 1


def test_a_page_whose_source_fails_can_be_claimed_again(ram, view, source) -> None:
    pager = Pager(ram, view, source)
    claims = pager.share(SharedClaims)
    source.broken = {5}
    with pytest.raises(Exception, match="gone"):
        pager.bring_in(5 * PAGE_SIZE)
    assert claims.take(5)


def a_lot_that_draws(page: int | None, first: int, end: int, asked: int) -> int:
    """A state of the generator after which that page is drawn, or none."""
    words = blank_words(0)
    for lot in range(100_000):
        words[at.LOT] = lot << 40
        if hot_around.draw(words, first, end, asked) == (-1 if page is None else page):
            return lot << 40
    raise AssertionError(f"page {page} is never drawn")


# -- bringing in ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [at.SOURCE_MEMORY, at.SOURCE_FILE])
@pytest.mark.parametrize("in_cache", [False, True])
@pytest.mark.parametrize(("window", "withheld"), [(1, None), (4, None), (4, 5), (4, 7)])
def test_a_window_is_brought_in_around_what_is_there(
    ram, tmp_path, pagemap, kind, in_cache, window, withheld
) -> None:
    """Pages of the window that others have claimed are left alone, and their bytes with them."""
    content = b"".join(bytes([n + 1]) * PAGE_SIZE for n in range(ram.pages))
    path = tmp_path / "source"
    path.write_bytes(content)
    buffer = ctypes.create_string_buffer(content, len(content))
    staging = ctypes.create_string_buffer((window + 1) * PAGE_SIZE)
    view = Registered(ram, sigbus=True)
    with path.open("rb") as file:
        if in_cache:
            ram.bytes[6 * PAGE_SIZE] = 0  # a page of zeros, in nobody's claim
        claims = SharedClaims(filled := bytearray(ram.pages), (4,))
        words = blank_words(1)
        describe_memory(words, ram, SlotMap())
        words[at.FILLED_AT], words[at.CLAIMS_AT] = claims.filled_at, claims.at
        words[at.UFFD], words[at.SOURCE], words[at.WINDOW] = view.uffd.fileno(), kind, window
        words[at.SOURCE_AT] = file.fileno() if kind == at.SOURCE_FILE else ctypes.addressof(buffer)
        words[at.STREAMS : at.STREAMS + at.STREAM_WORDS] = 7, 8, window  # a guest that goes down
        words[at.LOT] = a_lot_that_draws(withheld, 5, 8, 6)
        words[at.SLOTS] = 1
        words[at.SLOT_TABLE : at.SLOT_TABLE + at.SLOT_WORDS] = 0, ram.size, 0
        words[at.STAGING_AT] = -(-ctypes.addressof(staging) // PAGE_SIZE) * PAGE_SIZE
        words[at.KVM_RUN_AT] = ctypes.addressof(run := uapi.kvm_run())
        assert hot._bring_in(words, 6)
        expected = [6] if window == 1 else [5, 6, 7]
        assert [n for n in range(ram.pages) if filled[n]] == expected
        assert [n for n in expected if filled[n] != IN] == ([] if withheld is None else [withheld])
        assert words[at.PAGES_IN] == len(expected)
        assert words[at.AHEAD] == len(expected) - 1
        assert words[at.WITHHELD] == (withheld is not None)
        for n in expected:
            assert pagemap.present(ram.guest.address + n * PAGE_SIZE) == (n != withheld)
            here = slice(n * PAGE_SIZE, (n + 1) * PAGE_SIZE)
            assert ram.bytes[here] == content[here]
        assert not hot._bring_in(words, 4), "somebody else's"
        assert hot._bring_in(words, 6)
        assert words[at.AGAIN] == 1
        if withheld is not None:
            assert hot._bring_in(words, withheld)
            assert pagemap.present(ram.guest.address + withheld * PAGE_SIZE)
            assert hot._bring_in(words, withheld)
            assert (words[at.WANTED], words[at.AGAIN]) == (1, 2)
        del run
    view.close()


class Around:
    """A pager that lets every page of a window in, and tells which window it was."""

    def __init__(self, taken: set[int]) -> None:
        self.taken = taken
        self.window = range(0)

    def bring_in(self, offset: int) -> bool:
        return bool(self.bring_in_around(offset, range(0)))

    def bring_in_around(self, offset: int, window: range) -> range:
        page = offset // PAGE_SIZE
        self.window = window or range(page, page + 1)
        first, end = page, page + 1
        while end < self.window.stop and end not in self.taken:
            end += 1
        while first > self.window.start and first - 1 not in self.taken:
            first -= 1
        return range(first, end)


@settings(deadline=None)
@given(
    st.lists(st.tuples(st.integers(0, 199), st.integers(1, 20)), max_size=8),
    st.sampled_from([1, 2, 16]),
    st.sets(st.integers(0, 199)),
)
def test_windows_are_those_of_the_plain_loop(walks, limit, taken) -> None:
    """Whatever the guest does, and whatever others have brought in: the same windows."""
    slots = SlotMap()
    slots.add(MemorySlot(gpa=0, size=70 * PAGE_SIZE, hva=0, slot=0))
    slots.add(MemorySlot(gpa=1 << 32, size=100 * PAGE_SIZE, hva=70 * PAGE_SIZE, slot=1))
    words = blank_words(2)
    words[at.WINDOW], words[at.SLOTS] = limit, 2
    for row, slot in enumerate(slots):
        begin = at.SLOT_TABLE + row * at.SLOT_WORDS
        words[begin : begin + 3] = slot.gpa, slot.end, slot.hva - slot.gpa
    pager = Around(taken)
    plain = FaultAround(pager, limit, slot_pages(slots, 0))
    for first, length in walks:
        for page in range(first, first + length):
            plain.bring_in(page * PAGE_SIZE)
            assert range(*hot_around.widest(words, page)) == pager.window
            run = pager.bring_in_around(page * PAGE_SIZE, pager.window)
            hot_around.came_in(words, run.start, run.stop)


@settings(deadline=None)
@given(st.lists(st.integers(0, 1 << 40), max_size=50))
def test_latencies_fall_into_the_same_buckets(latencies) -> None:
    words, counts = blank_words(0), np.zeros(BUCKETS, np.int64)
    plain, taken_over = LatencyHistogram(), LatencyHistogram()
    for ns in latencies:
        hot._record(words, counts, ns)
        plain.record(ns)
    total, longest = int(words[at.LATENCY_TOTAL]), int(words[at.LATENCY_MAX])
    taken_over.add(counts.tolist(), total, longest)
    assert list(taken_over.buckets()) == list(plain.buckets())
    assert (taken_over.count, taken_over.total, taken_over.max) == (
        plain.count,
        plain.total,
        plain.max,
    )
