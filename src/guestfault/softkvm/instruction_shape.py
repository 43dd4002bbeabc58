"""What the emulator wants to know of an instruction before it carries it out."""

from __future__ import annotations

import functools
from typing import NamedTuple

from iced_x86 import MemorySizeExt, Mnemonic, OpKind, Register

from guestfault.x86.instruction import decode

__all__ = ["PLAIN", "Shape", "shape_of"]


class Shape(NamedTuple):
    """Its memory operand, and how it goes about it."""

    operand: int
    """Bytes of its memory operand; 0 if it has none."""
    locked: bool
    """Whether it exchanges memory atomically."""
    system: bool
    """Whether it may read descriptors."""
    count_mask: int
    """What of RCX counts its repetitions; 0 if it is not repeated."""
    compares: bool
    """CMPS: KVM reads the source (rSI) first, the engine the destination (rDI)."""
    two_operands: bool
    """MOVS, CMPS, PUSH and POP of memory: ``TwoMemOp`` in emulate.c."""


PLAIN = Shape(0, False, False, 0, False, False)
"""Nothing of note."""

_DESCRIPTORS = {
    *(Mnemonic.LDS, Mnemonic.LES, Mnemonic.LSS, Mnemonic.LFS, Mnemonic.LGS),
    *(Mnemonic.LAR, Mnemonic.LSL, Mnemonic.VERR, Mnemonic.VERW, Mnemonic.LLDT, Mnemonic.LTR),
    *(Mnemonic.RETF, Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ),
}
# CMPSD is also the name of a vector instruction.
_CMPS = {Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSD, Mnemonic.CMPSQ}
_MOVS = {Mnemonic.MOVSB, Mnemonic.MOVSW, Mnemonic.MOVSD, Mnemonic.MOVSQ}
_PUSH_POP = {Mnemonic.PUSH, Mnemonic.POP}
_SEGMENTS = range(Register.ES, Register.GS + 1)
_MEMORY_64 = {OpKind.MEMORY_SEG_RSI, OpKind.MEMORY_SEG_RDI, OpKind.MEMORY_ESRDI}
_MEMORY_32 = {OpKind.MEMORY_SEG_ESI, OpKind.MEMORY_SEG_EDI, OpKind.MEMORY_ESEDI}


@functools.lru_cache(maxsize=1024)
def shape_of(code: bytes, code_size: int) -> Shape:
    """The shape of the instruction that ``code`` is."""
    insn, _ = decode(code, 0, code_size)
    kinds = {insn.op_kind(i) for i in range(insn.op_count)}
    mask = 0
    if insn.is_string_instruction and (insn.has_rep_prefix or insn.has_repne_prefix):
        wide, narrow = kinds & _MEMORY_64, kinds & _MEMORY_32
        mask = 2**64 - 1 if wide else 0xFFFFFFFF if narrow else 0xFFFF
    far = insn.is_call_far or insn.is_jmp_far
    return Shape(
        operand=MemorySizeExt.size(insn.memory_size),
        locked=insn.has_lock_prefix or insn.mnemonic == Mnemonic.XCHG,
        system=far
        or insn.is_call_far_indirect
        or insn.is_jmp_far_indirect
        or insn.mnemonic in _DESCRIPTORS
        or (insn.op_count > 0 and insn.op0_register in _SEGMENTS),
        count_mask=mask,
        compares=insn.mnemonic in _CMPS and insn.is_string_instruction,
        two_operands=(insn.mnemonic in _MOVS | _CMPS and insn.is_string_instruction)
        or (insn.mnemonic in _PUSH_POP and OpKind.MEMORY in kinds),
    )
