"""Gathers, scatters and masked moves: accesses that depend on the contents of vector registers.

Elements that a mask switches off are not accessed and cannot fault.  With the registers known each
remaining element (neighbours joined into one run) is an access; without them the instruction's
whole reach is reported as uncertain, or, for a gather, as an unknown address.
"""

from __future__ import annotations

from collections.abc import Iterable

from iced_x86 import Instruction, MemorySizeInfo, Mnemonic, Register, RegisterInfo, UsedMemory

from guestfault.x86.addressing import CodeContext, sign_extend
from guestfault.x86.memory_access import AccessKind, MemoryAccess, Role

__all__ = ["gather", "is_masked", "masked"]

_VECTOR_BANKS = (Register.XMM0, Register.YMM0, Register.ZMM0)

#: The mask is the sign bit of each element of a vector register, operand 1.
_VECTOR_MASKED = {
    Mnemonic.VMASKMOVPS,
    Mnemonic.VMASKMOVPD,
    Mnemonic.VPMASKMOVD,
    Mnemonic.VPMASKMOVQ,
}

#: The mask is the top bit of each byte of operand 2; the destination is DS:rDI.
_BYTE_MASKED = {Mnemonic.MASKMOVQ, Mnemonic.MASKMOVDQU, Mnemonic.VMASKMOVDQU}

#: Memory holds only the elements whose mask bit is set, packed together.
_PACKED = {
    *(Mnemonic.VPEXPANDB, Mnemonic.VPEXPANDW, Mnemonic.VPEXPANDD, Mnemonic.VPEXPANDQ),
    *(Mnemonic.VEXPANDPS, Mnemonic.VEXPANDPD, Mnemonic.VCOMPRESSPS, Mnemonic.VCOMPRESSPD),
    *(Mnemonic.VPCOMPRESSB, Mnemonic.VPCOMPRESSW, Mnemonic.VPCOMPRESSD, Mnemonic.VPCOMPRESSQ),
}

#: Memory element i belongs to mask bit i.  Of other masked instructions (shuffles, broadcasts,
#: conversions that pair elements) that is not said here, so their whole operand stays uncertain.
_MOVES = {
    *(Mnemonic.VMOVUPS, Mnemonic.VMOVUPD, Mnemonic.VMOVAPS, Mnemonic.VMOVAPD),
    *(Mnemonic.VMOVDQU8, Mnemonic.VMOVDQU16, Mnemonic.VMOVDQU32, Mnemonic.VMOVDQU64),
    *(Mnemonic.VMOVDQA32, Mnemonic.VMOVDQA64, Mnemonic.VMOVSS, Mnemonic.VMOVSD, Mnemonic.VMOVSH),
    *(Mnemonic.VPMOVDB, Mnemonic.VPMOVDW, Mnemonic.VPMOVQB, Mnemonic.VPMOVQW, Mnemonic.VPMOVQD),
    *(Mnemonic.VPMOVWB, Mnemonic.VPMOVZXBW, Mnemonic.VPMOVZXBD, Mnemonic.VPMOVZXBQ),
    *(Mnemonic.VPMOVZXWD, Mnemonic.VPMOVZXWQ, Mnemonic.VPMOVZXDQ, Mnemonic.VPMOVSXBW),
    *(Mnemonic.VPMOVSXBD, Mnemonic.VPMOVSXBQ, Mnemonic.VPMOVSXWD, Mnemonic.VPMOVSXWQ),
    Mnemonic.VPMOVSXDQ,
}


def is_masked(instruction: Instruction) -> bool:
    """Whether :func:`masked`, and not the plain rule, describes the memory operand."""
    return (
        instruction.has_op_mask
        or instruction.mnemonic in _VECTOR_MASKED
        or instruction.mnemonic in _BYTE_MASKED
    )


def masked(
    context: CodeContext, instruction: Instruction, used: UsedMemory, kind: AccessKind
) -> list[MemoryAccess]:
    """The accesses of a masked operand: one for each run of elements that the mask selects."""
    info = MemorySizeInfo(used.memory_size)
    size, element = info.size, info.element_size
    offset = context.offset(used.base, used.index, used.scale, used.displacement, used.address_size)
    mnemonic = instruction.mnemonic
    if mnemonic in _BYTE_MASKED:
        element = 1
        chosen = _sign_bits(context, instruction.op_register(2), 1, size)
        why = f"bytes are chosen by {_name(instruction.op_register(2))}, which is not known"
    elif mnemonic in _VECTOR_MASKED:
        chosen = _sign_bits(context, instruction.op_register(1), element, size // element)
        why = f"elements are chosen by {_name(instruction.op_register(1))}, which is not known"
    else:
        mask = context.state.masks.get(instruction.op_mask - Register.K0)
        why = f"elements are chosen by {_name(instruction.op_mask)}, which is not known"
        chosen = None if mask is None else [i for i in range(size // element) if mask >> i & 1]
        if mask is not None and mnemonic in _PACKED:
            chosen = list(range(len(chosen or [])))
        elif mask is not None and mnemonic not in _MOVES:
            chosen = None
            why = f"{_name(instruction.op_mask)} masks the operation and may suppress the access"
    if chosen is None:
        return [
            context.access(used.segment, offset, size, kind, Role.OPERAND, note=why, certain=False)
        ]
    bits = context.code_size if context.code_size != 16 else 32
    return [
        context.access(
            used.segment,
            (offset + first * element) & ((1 << bits) - 1),
            count * element,
            kind,
            Role.ELEMENT,
        )
        for first, count in _runs(chosen)
    ]


def gather(
    context: CodeContext, instruction: Instruction, used: UsedMemory, kind: AccessKind
) -> list[MemoryAccess]:
    """The accesses of a VSIB operand, lowest element first, which is the order of faults."""
    element = MemorySizeInfo(used.memory_size).element_size
    index_size = used.vsib_size
    data_operand = 0 if kind is AccessKind.READ else instruction.op_count - 1
    data = RegisterInfo(instruction.op_register(data_operand)).size
    lanes = min(data // element, RegisterInfo(used.index).size // index_size)
    indices = _vector(context, used.index, lanes * index_size)
    chosen: list[int] | None
    if instruction.has_op_mask:
        mask_name = _name(instruction.op_mask)
        mask = context.state.masks.get(instruction.op_mask - Register.K0)
        chosen = None if mask is None else [i for i in range(lanes) if mask >> i & 1]
    else:
        mask_register = instruction.op_register(2)
        mask_name = _name(mask_register)
        chosen = _sign_bits(context, mask_register, element, lanes)
    if indices is None:
        why = f"{_name(used.index)} (the indices) is not known"
        if chosen is None:
            why = f"{_name(used.index)} (the indices) and {mask_name} (the mask) are not known"
        count = lanes if chosen is None else len(chosen)
        return [context.unknown(element, kind, Role.ELEMENT, why)] * min(count, 1)
    accesses = []
    for lane in range(lanes) if chosen is None else chosen:
        raw = int.from_bytes(indices[lane * index_size : (lane + 1) * index_size], "little")
        displacement = sign_extend(raw, index_size * 8) * used.scale + used.displacement
        offset = context.offset(used.base, Register.NONE, 1, displacement, used.address_size)
        note = f"lane {lane}"
        if chosen is None:
            note += f", if {mask_name} chooses it, which is not known"
        accesses.append(
            context.access(
                used.segment,
                offset,
                element,
                kind,
                Role.ELEMENT,
                note=note,
                certain=chosen is not None,
            )
        )
    return accesses


def _vector(context: CodeContext, register: int, size: int) -> bytes | None:
    """The low ``size`` bytes of a vector register, if that many are known."""
    for bank in _VECTOR_BANKS:
        if bank <= register < bank + 32:
            data = context.state.vectors.get(register - bank)
            return data[:size] if data is not None and len(data) >= size else None
    return None


def _sign_bits(context: CodeContext, register: int, element: int, count: int) -> list[int] | None:
    """Numbers of the elements whose top bit is set."""
    data = _vector(context, register, element * count)
    if data is None:
        return None
    return [i for i in range(count) if data[(i + 1) * element - 1] & 0x80]


def _runs(chosen: Iterable[int]) -> list[tuple[int, int]]:
    """Ascending numbers as (first, count) of each run without a gap."""
    runs: list[tuple[int, int]] = []
    for number in chosen:
        if runs and sum(runs[-1]) == number:
            runs[-1] = (runs[-1][0], runs[-1][1] + 1)
        else:
            runs.append((number, 1))
    return runs


def _name(register: int) -> str:
    if Register.K0 <= register <= Register.K7:
        return f"k{register - Register.K0}"
    for bank, letter in zip(_VECTOR_BANKS, "xyz", strict=True):
        if bank <= register < bank + 32:
            return f"{letter}mm{register - bank}"
    return f"mm{register - Register.MM0}"
