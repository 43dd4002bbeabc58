"""What a built-in guest must compute: its checksums and final memory, worked out by the host.

A guest that ran to its end proves nothing; one whose checksum agrees with a prediction made without
any guest proves that every page arrived whole, once, and before it was used.  So this is a second,
independent account of :mod:`~guestfault.guest.walk`: generators of page numbers, and pages as big
integers.  It neither reads nor emulates the code.

Xoring a page with h is one ``^`` of two 32768-bit integers.  Summing its words takes ten additions:
every word gets a lane of twice its width, and the page is folded in half until one lane is left.
Both are several times faster than a loop over words, and need nothing but Python.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Final

from guestfault.guest.layout import PAGE_SIZE, Layout
from guestfault.guest.walk import (
    HASH_MULTIPLIER,
    LCG_INCREMENT,
    LCG_MULTIPLIER,
    ZIPF_BITS,
    Order,
    Walk,
    initial_hash,
)

__all__ = ["Expectation", "expect", "pages_visited"]

_PAGE_BITS: Final = PAGE_SIZE * 8


@dataclass(frozen=True)
class Expectation:
    """What the vCPUs leave behind.

    ``checksums`` has one entry per vCPU, of the width of the guest's words; ``memory`` is the whole
    memory after all of them are done.
    """

    checksums: tuple[int, ...]
    memory: bytearray


def expect(layout: Layout, walk: Walk, memory: bytes | bytearray | memoryview) -> Expectation:
    """Predict a guest's results from its initial memory, header included.

    ``memory`` holds ``layout.memory_size`` bytes and is not changed.  vCPUs write to their own
    shares only, so the order in which they run does not matter.
    """
    model = _Model(layout, bytearray(memory))
    return Expectation(tuple(model.run(walk, vcpu) for vcpu in range(layout.vcpus)), model.memory)


def pages_visited(layout: Layout, walk: Walk, vcpu: int) -> Iterator[tuple[int, bool]]:
    """Each visit that a vCPU pays to a data page: its page number, and whether it stores first."""
    share = layout.share(vcpu)
    for phase in walk.phases:
        order = _zipf if phase.order is Order.ZIPF else _cycle
        indices = order(phase.order, len(share), layout)
        for index in islice(indices, phase.passes * len(share)):
            yield share[index], phase.store_first


def _cycle(order: Order, count: int, layout: Layout) -> Iterator[int]:
    """All indices below ``count``, over and over."""
    index = layout.index_mask
    while True:
        index = _next(order, index, count, layout)
        yield index


def _zipf(order: Order, count: int, layout: Layout) -> Iterator[int]:
    """Indices by Zipf's law, for ever."""
    octaves = layout.largest_share.bit_length()
    draws = _draws(layout.index_mask)
    while True:
        low_first = octaves - 1 - (next(draws) >> 16) * octaves // (1 << 16)
        place = next(draws) >> ZIPF_BITS - low_first
        rank = (1 << low_first) + place - 1
        if rank < count:
            yield _next(order, rank, count, layout)


def _draws(state: int) -> Iterator[int]:
    """The generator behind Zipf's ranks."""
    while True:
        state = (state * LCG_MULTIPLIER + LCG_INCREMENT) % (1 << ZIPF_BITS)
        yield state


def _next(order: Order, index: int, count: int, layout: Layout) -> int:
    """The step that all orders end in: a permutation of the indices below ``count``."""
    multiplier, increment = order.step
    while True:
        index = (index * multiplier + increment) & layout.index_mask
        if index < count:
            return index


class _Model:
    """The memory and the arithmetic on it."""

    def __init__(self, layout: Layout, memory: bytearray) -> None:
        if len(memory) != layout.memory_size:
            raise ValueError(f"{len(memory)} bytes of memory for a guest of {layout.memory_size}")
        self.layout = layout
        self.memory = memory
        self.word_bits = 8 * layout.mode.word_size
        self.word_mask = (1 << self.word_bits) - 1
        lane = 2 * self.word_bits
        self.low_words = sum(self.word_mask << at for at in range(0, _PAGE_BITS, lane))
        self.every_word = sum(1 << at for at in range(0, _PAGE_BITS, self.word_bits))
        halves = [_PAGE_BITS >> n for n in range(1, (_PAGE_BITS // lane).bit_length())]
        self.folds = [(half, (1 << half) - 1) for half in halves]

    def run(self, walk: Walk, vcpu: int) -> int:
        """All that one vCPU does to the memory; its checksum."""
        memory, word_size = self.memory, self.layout.mode.word_size
        h = initial_hash(vcpu, self.word_bits)
        for number, store_first in pages_visited(self.layout, walk, vcpu):
            at = number * PAGE_SIZE
            if store_first:
                memory[at : at + word_size] = h.to_bytes(word_size, "little")
            page = int.from_bytes(memory[at : at + PAGE_SIZE], "little")
            h = self.mix(h, page)
            memory[at : at + PAGE_SIZE] = (page ^ h * self.every_word).to_bytes(PAGE_SIZE, "little")
        for at in range(0, self.layout.header_pages * PAGE_SIZE, PAGE_SIZE):
            h = self.mix(h, int.from_bytes(memory[at : at + PAGE_SIZE], "little"))
        return h

    def mix(self, h: int, page: int) -> int:
        """h after one more page was read."""
        h ^= h >> self.word_bits // 2
        return (h * HASH_MULTIPLIER + self.sum(page)) & self.word_mask

    def sum(self, page: int) -> int:
        """The sum of the page's words, which fits a lane: 1024 words need 10 bits more than one."""
        lanes = (page & self.low_words) + (page >> self.word_bits & self.low_words)
        for half, mask in self.folds:
            lanes = (lanes >> half) + (lanes & mask)
        return lanes
