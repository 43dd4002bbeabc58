from __future__ import annotations

import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.paging.source.base import SourceError
from guestfault.paging.source.blocks import BlockCache, CachedSource
from guestfault.paging.source.function import FunctionSource

CONTENT = bytes(range(256)) * 40


@given(st.integers(50, 3000), st.integers(0, 20000), st.data())
def test_whatever_the_blocks_and_the_cache_a_read_gives_its_bytes(block, cache, data) -> None:
    inner = FunctionSource(len(CONTENT), lambda offset, n: CONTENT[offset : offset + n])
    source = CachedSource(inner, block, cache)
    for _ in range(5):
        start = data.draw(st.integers(0, len(CONTENT)))
        length = data.draw(st.integers(0, len(CONTENT) - start))
        buffer = bytearray(length)
        source.read_into(start, memoryview(buffer))
        assert buffer == CONTENT[start : start + length]


def test_no_more_than_the_capacity_is_kept_and_the_oldest_goes_first() -> None:
    reads: list[int] = []
    cache = BlockCache(lambda n: reads.append(n) or bytes([n]), 3)  # type: ignore[func-returns-value]
    for number in (0, 1, 2, 0, 3, 1, 2, 3, 0):
        assert cache.get(number) == bytes([number])
    assert reads == [0, 1, 2, 3, 0]


def test_those_who_wait_get_the_error_of_the_one_that_reads() -> None:
    began, go_on = threading.Event(), threading.Event()

    def read(number: int) -> bytes:
        began.set()
        go_on.wait()
        raise SourceError(0, 1, "gone")

    cache = BlockCache(read, 3)
    said: list[str] = []

    def reader() -> None:
        try:
            cache.get(7)
        except SourceError as error:
            said.append(error.why)

    threads = [threading.Thread(target=reader) for _ in range(3)]
    threads[0].start()
    began.wait()
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert said == ["gone"] * 3


def test_a_reader_that_was_killed_leaves_the_block_to_those_who_wait() -> None:
    began, go_on = threading.Event(), threading.Event()
    reads = []

    def read(number: int) -> bytes:
        reads.append(number)
        if len(reads) == 1:
            began.set()
            go_on.wait()
            raise KeyboardInterrupt
        return b"block"

    cache = BlockCache(read, 3)
    killed, got = [], []

    def first() -> None:
        try:
            cache.get(7)
        except KeyboardInterrupt:
            killed.append(True)

    threads = [threading.Thread(target=first)]
    threads += [threading.Thread(target=lambda: got.append(cache.get(7))) for _ in range(2)]
    threads[0].start()
    began.wait()
    for thread in threads[1:]:
        thread.start()
    go_on.set()
    for thread in threads:
        thread.join()
    assert (killed, got) == ([True], [b"block"] * 2)
    assert len(reads) == 2


def test_what_lies_beyond_is_refused() -> None:
    source = CachedSource(FunctionSource(10, lambda offset, n: bytes(n)), 4)
    with pytest.raises(SourceError, match="it has 10 bytes"):
        source.read_into(8, memoryview(bytearray(3)))
