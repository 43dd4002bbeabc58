"""Both rings against a kernel of our own, which writes records as ``ring_buffer.c`` does.

It is the contract in a few lines: positions only grow (or only shrink), a record is written at its
position modulo the ring, and ``data_head`` is stored last.
"""

from __future__ import annotations

import struct
from mmap import PAGESIZE

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from guestfault.linux.perf_ring import OverwriteRing, QueueRing
from guestfault.uapi import perf as uapi

HEAD = uapi.perf_event_mmap_page.data_head.offset
TAIL = uapi.perf_event_mmap_page.data_tail.offset
U64 = (1 << 64) - 1

# A body is a multiple of 8 bytes, of a content that tells it from others.
bodies = st.lists(st.integers(0, 30), max_size=120).map(
    lambda lengths: [bytes([i & 0xFF]) * (8 * n) for i, n in enumerate(lengths)]
)
sizes = st.sampled_from([256, 512, 4096])


def record(body: bytes, type_: int = uapi.PERF_RECORD_SAMPLE) -> bytes:
    return struct.pack("<IHH", type_, 0, 8 + len(body)) + body


class Kernel:
    def __init__(self, size: int, start: int = 0) -> None:
        self.memory = bytearray(PAGESIZE + size)
        self.size = size
        self.head = start
        self.unreported = 0
        for at in (HEAD, TAIL):
            struct.pack_into("<Q", self.memory, at, start & U64)

    def put(self, position: int, data: bytes) -> None:
        for i, byte in enumerate(data):
            self.memory[PAGESIZE + (position + i) % self.size] = byte

    def publish(self) -> None:
        struct.pack_into("<Q", self.memory, HEAD, self.head & U64)

    def append(self, data: bytes) -> bool:
        """Upwards, unless that would reach what is unread; a loss is told before the next one."""
        lost = b""
        if self.unreported:
            body = struct.pack("<QQ", 1, self.unreported)
            lost = record(body, uapi.PERF_RECORD_LOST)
        (tail,) = struct.unpack_from("<Q", self.memory, TAIL)
        if (self.head - tail & U64) + len(lost + data) > self.size:
            self.unreported += 1
            return False
        self.put(self.head, lost + data)
        self.head += len(lost + data)
        self.unreported = 0
        self.publish()
        return True

    def prepend(self, data: bytes) -> None:
        """Downwards, over whatever is there."""
        self.head -= len(data)
        self.put(self.head, data)
        self.publish()


@given(bodies, sizes, st.data())
def test_queue_loses_nothing_that_it_does_not_count(
    bodies: list[bytes], size: int, data: st.DataObject
) -> None:
    # Far along, so that positions pass 2 ** 64 - they are numbers of 64 bits - or close to it.
    kernel = Kernel(size, start=data.draw(st.integers(0, 1 << 50)) * 8)
    ring = QueueRing(memoryview(kernel.memory))
    written, seen = [], []
    for body in bodies:
        if kernel.append(record(body)):
            written.append(record(body))
        if data.draw(st.booleans()):
            seen += ring.drain()
    seen += ring.drain()
    assert seen == written
    assert ring.lost + kernel.unreported == len(bodies) - len(written)
    assert ring.drain() == []


@given(bodies, sizes)
def test_overwrite_has_the_newest_that_fit(bodies: list[bytes], size: int) -> None:
    kernel = Kernel(size)
    ring = OverwriteRing(memoryview(kernel.memory))
    records: list[bytes] = []
    for body in bodies:
        kernel.prepend(record(body))
        records.insert(0, record(body))
        assert ring.latest() == (record(body) if len(record(body)) <= size else None)
    fitting = []
    for one in records:
        if sum(map(len, fitting)) + len(one) > size:
            break
        fitting.append(one)
    found = []
    for memory, at in ring.newest_first():
        (length,) = struct.unpack_from("<H", memory, at + 6)
        found.append(bytes(memory[at : at + length]))
    assert found == fitting


def test_an_empty_ring_has_nothing() -> None:
    kernel = Kernel(4096)
    assert OverwriteRing(memoryview(kernel.memory)).latest() is None
    assert QueueRing(memoryview(kernel.memory)).drain() == []


# A size that leads to where no record can begin.
@example(bytes(6) + b"\xfa" + bytes(249), 32)
@given(st.binary(min_size=256, max_size=256), st.integers(0, U64 >> 3))
def test_garbage_ends_the_reading(garbage: bytes, head: int) -> None:
    kernel = Kernel(256)
    kernel.memory[PAGESIZE:] = garbage
    kernel.head = head << 3
    kernel.publish()
    assert sum(1 for _ in OverwriteRing(memoryview(kernel.memory)).newest_first()) <= 32
    queue = QueueRing(memoryview(kernel.memory))
    if kernel.head <= 1 << 16:
        queue.drain()
        assert queue.drain() == []


@pytest.mark.parametrize("size", [0, 4, 4096 * 3])
def test_no_ring_has_such_a_size(size: int) -> None:
    with pytest.raises(ValueError, match="power of two"):
        QueueRing(memoryview(bytearray(PAGESIZE + size)))
