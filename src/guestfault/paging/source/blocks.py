"""Blocks read once and kept for a while.

A compressed or a remote source is read in blocks of many pages, and the pager asks for one page at
a time.  :class:`BlockCache` keeps the blocks that were read last.  Two vCPUs that need the same
block read it once: the first reads it, the second waits for the first.  Two that need different
blocks do not meet: no lock is held while a block is read, and a block that is there is found
without any.

It is for pages that are read once each: what has been there longest goes first, whether or not it
was of use lately, for that can be had without a lock.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from guestfault.paging.source.base import (
    PageSource,
    SourceError,
    SourceUpon,
    check_range,
)

__all__ = ["DEFAULT_CACHE", "BlockCache", "CachedSource"]

DEFAULT_CACHE = 32 << 20  # bytes: half a thousand blocks of 64 KiB


class _Read:
    """A block that one thread reads, and what the others wait for."""

    __slots__ = ("block", "error", "over")

    def __init__(self) -> None:
        self.over = threading.Event()
        self.block: bytes | None = None
        self.error: Exception | None = None


class BlockCache:
    """The last ``capacity`` blocks that ``read`` gave, by number.  For any number of threads."""

    def __init__(self, read: Callable[[int], bytes], capacity: int) -> None:
        self._read = read
        self._capacity = max(1, capacity)
        self._blocks: dict[int, bytes] = {}  # oldest first
        self._reads: dict[int, _Read] = {}
        self._lock = threading.Lock()  # of the two dictionaries' keys, for moments only

    def get(self, number: int) -> bytes:
        """The block; raises whatever reading it raised, to everyone who waited for it."""
        while True:
            block = self._blocks.get(number)
            if block is not None:
                return block
            with self._lock:
                if number in self._blocks:
                    continue
                under_way = self._reads.get(number)
                if under_way is None:
                    mine = self._reads[number] = _Read()
            if under_way is None:
                return self._fetch(number, mine)
            under_way.over.wait()
            if under_way.error is not None:
                raise under_way.error
            if under_way.block is not None:
                return under_way.block  # it may have had to go again already

    def _fetch(self, number: int, mine: _Read) -> bytes:
        try:
            mine.block = self._read(number)
        except Exception as error:
            mine.error = error
            raise
        finally:
            # Without a block and an error, the reader was killed: those who wait try themselves.
            with self._lock:
                del self._reads[number]
                if mine.block is not None:
                    while len(self._blocks) >= self._capacity:
                        del self._blocks[next(iter(self._blocks))]
                    self._blocks[number] = mine.block
            mine.over.set()
        return mine.block

    def read_into(self, offset: int, buffer: memoryview, block_size: int) -> None:
        """Fill ``buffer`` from blocks of ``block_size`` bytes, of which the last may be shorter.

        A :class:`~guestfault.paging.source.base.SourceError` of a block's names the bytes that were
        asked for here.
        """
        done, length = 0, len(buffer)
        try:
            while done < length:
                number, start = divmod(offset + done, block_size)
                block = self.get(number)
                n = min(len(block) - start, length - done)
                buffer[done : done + n] = block[start : start + n]
                done += n
        except SourceError as error:
            raise error.at(offset, length) from error


class CachedSource(SourceUpon):
    """``inner``, read in blocks of ``block_size`` bytes: for one that is slow to answer."""

    def __init__(
        self, inner: PageSource, block_size: int = 1 << 16, cache: int = DEFAULT_CACHE
    ) -> None:
        super().__init__(inner)
        self.size = inner.size
        self._block_size = block_size
        self._blocks = BlockCache(self._read_block, cache // block_size)

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See :class:`~guestfault.paging.source.base.PageSource`."""
        check_range(self, offset, len(buffer))
        self._blocks.read_into(offset, buffer, self._block_size)

    def _read_block(self, number: int) -> bytes:
        start = number * self._block_size
        block = bytearray(min(self._block_size, self.size - start))
        self._inner.read_into(start, memoryview(block))
        return bytes(block)
