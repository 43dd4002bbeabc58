"""The code of the built-in guests.

A guest announces itself with a byte to :data:`READY_PORT`, its first instruction; walks over the
data pages of its share (:mod:`~guestfault.guest.walk`); sums every page of the header, code and
page tables, which it never writes; sends its checksum to :data:`RESULT_PORT` as two dwords, low
half first; and then writes to :data:`DONE_PORT` for ever, because at CPL 3 it may not halt.  By
then every page of the memory has been touched by some vCPU.

The code is assembled for a layout and a walk, and is the same for all vCPUs.  What they differ in
comes in three registers:

======== ==================================================
rsi      the linear address of the share's first page
rbp      how many pages it has
rbx      the initial h
======== ==================================================

The rest of the eight registers that both modes have: rcx the state of the walk, rsp how many visits
are left (there is no stack: no interrupt, exception or call ever happens), rdi a pointer into the
page, rax the sum, rdx the end of the page and scratch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from guestfault.guest.assembler import Assembler, Operand
from guestfault.guest.layout import PAGE_SIZE, Layout
from guestfault.guest.walk import (
    HASH_MULTIPLIER,
    LCG_INCREMENT,
    LCG_MULTIPLIER,
    ZIPF_BITS,
    Order,
    Phase,
    Walk,
)

__all__ = ["DONE_PORT", "READY_PORT", "RESULT_PORT", "assemble"]

READY_PORT: Final = 0x10
RESULT_PORT: Final = 0x11
DONE_PORT: Final = 0x12

_UNROLL: Final = 16  # words per round of the inner loops: 1.2 instructions a word


def assemble(layout: Layout, walk: Walk) -> bytes:
    """The machine code for the start of the code page, less than 1 KiB of it."""
    return _Program(layout, walk).code


class _Program:
    """The code while it is assembled: the registers by their roles, and a method per part."""

    def __init__(self, layout: Layout, walk: Walk) -> None:
        self.layout = layout
        self.asm = asm = Assembler(64 if layout.mode.is_long else 16)
        self.hash = asm.word("BX")
        self.sum = asm.word("AX")
        self.pointer = asm.word("DI")
        self.end = asm.word("DX")
        self.share = asm.word("SI")
        self.pages = asm.dword("BP")
        self.state = asm.dword("CX")
        self.visits = asm.dword("SP")

        asm.out(READY_PORT, bits=8)
        for phase in walk.phases:
            self.phase(phase)
        self.header()
        self.result()
        self.code = asm.encode(layout.gva(layout.code * PAGE_SIZE))

    def phase(self, phase: Phase) -> None:
        """All the visits of one phase."""
        asm = self.asm
        asm.imul(self.visits, self.pages, phase.passes)
        asm.mov(self.state, self.layout.index_mask)
        again = asm.label()
        index = self.zipf_rank() if phase.order is Order.ZIPF else self.state
        self.step(index, *phase.order.step)
        self.visit(index, phase.store_first)
        asm.dec(self.visits)
        asm.branch("JNE", again)

    def step(self, index: Operand, multiplier: int, increment: int) -> None:
        """index = next(index), below the number of pages."""
        asm = self.asm
        again = asm.label()
        asm.imul(index, index, multiplier)
        asm.add(index, increment)
        asm.and_(index, self.layout.index_mask)
        asm.cmp(index, self.pages)
        asm.branch("JAE", again)

    def zipf_rank(self) -> Operand:
        """Draw a rank below the number of pages; 0 is the most frequent."""
        asm, state = self.asm, self.state
        octave, rank, saved = asm.dword("AX"), asm.dword("DX"), asm.dword("DI")
        octaves = self.layout.largest_share.bit_length()
        again = asm.label()
        self.draw()
        asm.mov(octave, state)
        asm.shr(octave, 16)
        asm.imul(octave, octave, octaves)
        asm.shr(octave, 16)
        # 1.bbbb, with the place's bits after the point, shifted right to lie in [2^j, 2^(j+1)).
        # A high octave here is a small j.
        asm.add(octave, ZIPF_BITS - octaves)
        self.draw()
        asm.mov(rank, state)
        asm.shr(rank, 1)
        asm.or_(rank, 1 << ZIPF_BITS - 1)
        asm.mov(saved, state)
        asm.mov(state, octave)  # the count must be in CL
        asm.shr(rank)
        asm.mov(state, saved)
        asm.dec(rank)
        asm.cmp(rank, self.pages)
        asm.branch("JAE", again)
        return rank

    def draw(self) -> None:
        """The next 32 bits of Zipf's generator."""
        self.asm.imul(self.state, self.state, LCG_MULTIPLIER)
        self.asm.add(self.state, LCG_INCREMENT)

    def visit(self, index: Operand, store_first: bool) -> None:
        """Sum a page of the share into the hash, then xor the hash into it."""
        asm, pointer = self.asm, self.pointer
        asm.mov(asm.dword("DI"), index)
        asm.shl(pointer, PAGE_SIZE.bit_length() - 1)
        asm.add(pointer, self.share)
        if store_first:
            asm.store(pointer, self.hash)
        self.sum_page()
        asm.sub(pointer, PAGE_SIZE)
        self.every_word(lambda at: asm.xor_memory(pointer, at, self.hash))

    def sum_page(self) -> None:
        """Read the page at the pointer into the hash; the pointer ends at the next page."""
        asm, scratch = self.asm, self.end
        asm.xor(self.sum, self.sum)
        self.every_word(lambda at: asm.add_memory(self.sum, self.pointer, at))
        asm.mov(scratch, self.hash)
        asm.shr(scratch, asm.word_bits // 2)
        asm.xor(self.hash, scratch)
        asm.imul(self.hash, self.hash, HASH_MULTIPLIER)
        asm.add(self.hash, self.sum)

    def header(self) -> None:
        """Sum the header, which the walk has not read."""
        asm = self.asm
        asm.mov(self.pointer, self.layout.gva(0))
        asm.mov(self.visits, self.layout.header_pages)
        again = asm.label()
        self.sum_page()
        asm.dec(self.visits)
        asm.branch("JNE", again)

    def result(self) -> None:
        """Send both halves of the hash, then say that it is over."""
        asm = self.asm
        accumulator, half = asm.dword("AX"), asm.dword("BX")
        asm.mov(accumulator, half)
        asm.out(RESULT_PORT, bits=32)
        if asm.word_bits == 64:
            asm.shr(self.hash, 32)
        else:
            asm.xor(self.hash, self.hash)
        asm.mov(accumulator, half)
        asm.out(RESULT_PORT, bits=32)
        again = asm.label()
        asm.out(DONE_PORT, bits=8)
        asm.branch("JMP", again)

    def every_word(self, access: Callable[[int], None]) -> None:
        """Do ``access(displacement)`` for each word of the page; the pointer ends behind it."""
        asm = self.asm
        size = asm.word_bits // 8
        asm.lea(self.end, self.pointer, PAGE_SIZE)
        again = asm.label()
        for word in range(_UNROLL):
            access(word * size)
        asm.add(self.pointer, _UNROLL * size)
        asm.cmp(self.pointer, self.end)
        asm.branch("JNE", again)
