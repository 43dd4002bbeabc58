"""The ring buffer of a perf event: how the kernel hands its records over, in two directions.

A mapped perf event is one page of control words (``struct perf_event_mmap_page``) and 2^n pages of
records.  A record begins with a header of 8 bytes that has its size, a multiple of 8; it may begin
at the end of the buffer and go on at its start.  There are two contracts, and they answer different
questions:

:class:`QueueRing`
    *What has happened, in order?*  The kernel writes upwards and stops where the reader has not
    been; what then happens is lost, and counted in a ``PERF_RECORD_LOST`` which is written once
    there is room again - **before the next record, not at the time**.  The last record of a full
    ring is therefore not known to be the last thing that happened.

:class:`OverwriteRing`
    *What has happened last?*  The kernel writes downwards (``attr.write_backward``), over the
    oldest, and ``data_head`` always is the newest record.  Nothing is ever refused; there is no
    tail to move.

Who wants to know what came just before an exit wants the second: a vCPU passes thousands of records
in a run that takes thousands of faults, and the one that matters is the last.

**Order of memory accesses** (``kernel/events/ring_buffer.c``, ``perf_output_put_handle``).  The
reader must load ``data_head`` before the records and finish with the records before it stores
``data_tail``.  x86 keeps loads in order among themselves, and a store behind the loads before it,
so it takes two plain 8-byte accesses and no fence; the words are accessed as native 8-byte items,
which is one instruction each.
"""

from __future__ import annotations

from collections.abc import Iterator
from mmap import PAGESIZE
from typing import Final

from guestfault.uapi import perf as uapi

__all__ = ["HEAD_OFFSET", "OverwriteRing", "QueueRing"]

HEAD_OFFSET: Final[int] = uapi.perf_event_mmap_page.data_head.offset

_HEADER: Final = 8
_ALIGN: Final = 8  # of every record: the kernel rounds its size up
_HEAD: Final = HEAD_OFFSET // 8
_TAIL: Final = uapi.perf_event_mmap_page.data_tail.offset // 8
_U64: Final = (1 << 64) - 1


class _Ring:
    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        """All of it: ``data_head`` is at :data:`HEAD_OFFSET`, the records from a page on."""
        self._words = memory[:PAGESIZE].cast("Q")
        self._data = memory[PAGESIZE:]
        self._size = len(self._data)
        if self._size < _HEADER or self._size & self._size - 1:
            raise ValueError(f"a ring of {self._size} bytes: it must be a power of two")
        self._mask = self._size - 1
        self._halfwords = self._data.cast("H")

    def release(self) -> None:
        """Let go of the memory."""
        self._halfwords.release()
        self._data.release()
        self._words.release()
        self.memory.release()

    def _record(self, offset: int, size: int) -> bytes:
        """The ``size`` bytes at ``offset``, put together if they wrap."""
        record = bytes(self._data[offset : offset + size])
        return record if len(record) == size else record + self._data[: size - len(record)]


class QueueRing(_Ring):
    """Records in order, each once; mapped readable *and writable*.

    ``memory`` is the whole mapping.  ``lost`` counts what ``PERF_RECORD_LOST`` has told so far.
    One reader at a time.
    """

    def __init__(self, memory: memoryview) -> None:
        super().__init__(memory)
        self.lost = 0

    def drain(self) -> list[bytes]:
        """The records since the last call, headers included, oldest first; and make room.

        A ``PERF_RECORD_LOST`` is counted in ``lost`` and not returned.
        """
        head, tail = self._words[_HEAD], self._words[_TAIL]
        records = []
        while tail != head:
            offset = tail & self._mask
            size = self._halfwords[offset + 6 >> 1]
            # The kernel writes no such size.  What is left cannot be told apart, so none of it is.
            if not _HEADER <= size <= head - tail or size % _ALIGN:
                break
            record = self._record(offset, size)
            if int.from_bytes(record[:4], "little") == uapi.PERF_RECORD_LOST:
                self.lost += int.from_bytes(record[16:24], "little")
            else:
                records.append(record)
            tail += size
        self._words[_TAIL] = head
        return records


class OverwriteRing(_Ring):
    """The most recent records; mapped readable only.  ``memory`` is the whole mapping.

    To be read while nothing is written: by the very thread that the events are of, or with their
    output paused.
    """

    def newest_first(self) -> Iterator[tuple[memoryview | bytes, int]]:
        """The records that are still whole, from the newest back: each where it lies.

        A pair of a buffer and the offset in it at which the record begins, with its header.  It is
        a view of the ring, good until the kernel writes again, or a copy if the record wraps.
        """
        at = self._words[_HEAD]
        data, halfwords, ring = self._data, self._halfwords, self._size
        # data_head counts down from 0, so its negative is what was ever written.
        left = min(-at & _U64, ring)
        while left >= _HEADER:
            offset = at & self._mask
            size = halfwords[offset + 6 >> 1]
            if not _HEADER <= size <= left or size % _ALIGN:  # the oldest, partly overwritten
                return
            if offset + size <= ring:
                yield data, offset
            else:
                yield self._record(offset, size), 0
            at += size
            left -= size

    def newest(self) -> tuple[memoryview, int]:
        """The ring's bytes, and where in them the newest record begins; it and others may wrap.

        A ring that has never been written has zeros there.
        """
        return self._data, self._words[_HEAD] & self._mask

    def latest(self) -> bytes | None:
        """A copy of the newest record, with its header; ``None`` if there has never been one."""
        for memory, offset in self.newest_first():
            size = int.from_bytes(memory[offset + 6 : offset + 8], "little")
            return bytes(memory[offset : offset + size])
        return None
