"""The accesses that one entry of iced's list of used memory stands for.

Most entries are one access.  The others are why this module exists: the bit string of a BT with a
register offset reaches beyond its operand, a string instruction steps through as many elements as
RCX says, an XSAVE area has the size that XCR0 and EDX:EAX give it, and an implicit stack access
has the width of the stack and not that of the code.
"""

from __future__ import annotations

from iced_x86 import (
    CodeSize,
    Instruction,
    MemorySize,
    MemorySizeInfo,
    Mnemonic,
    OpAccess,
    OpKind,
    Register,
    RegisterInfo,
    UsedMemory,
)

from guestfault.x86 import vector
from guestfault.x86.addressing import CodeContext, Operand, sign_extend
from guestfault.x86.memory_access import AccessKind, MemoryAccess, Role
from guestfault.x86.registers import X86_EFLAGS_DF

__all__ = ["plain_operand", "used_accesses"]

_KINDS = {
    OpAccess.READ: AccessKind.READ,
    OpAccess.COND_READ: AccessKind.READ,
    OpAccess.WRITE: AccessKind.WRITE,
    OpAccess.COND_WRITE: AccessKind.WRITE,
    OpAccess.READ_WRITE: AccessKind.READ_WRITE,
    # CMPXCHG and CMPXCHG8B/16B write in any case: the old value, if the comparison fails.
    OpAccess.READ_COND_WRITE: AccessKind.READ_WRITE,
}
_CONDITIONAL = {OpAccess.COND_READ, OpAccess.COND_WRITE}

#: Stack and frame pointers, as their numbers in encoding order.
_STACK_NUMBERS = {
    **dict.fromkeys((Register.SP, Register.ESP, Register.RSP), 4),
    **dict.fromkeys((Register.BP, Register.EBP, Register.RBP), 5),
}
_ADDRESS_BITS = {CodeSize.CODE16: 16, CodeSize.CODE32: 32, CodeSize.CODE64: 64}
_COUNTERS = {
    CodeSize.CODE16: Register.CX,
    CodeSize.CODE32: Register.ECX,
    CodeSize.CODE64: Register.RCX,
}
_DESTINATIONS = {Register.DI, Register.EDI, Register.RDI}
_COMPARING = {
    *(Mnemonic.CMPSB, Mnemonic.CMPSW, Mnemonic.CMPSD, Mnemonic.CMPSQ),
    *(Mnemonic.SCASB, Mnemonic.SCASW, Mnemonic.SCASD, Mnemonic.SCASQ),
}
_BIT_TESTS = {Mnemonic.BT, Mnemonic.BTS, Mnemonic.BTR, Mnemonic.BTC}
_CACHE_LINE = {Mnemonic.CLFLUSH, Mnemonic.CLFLUSHOPT, Mnemonic.CLWB}
_XSAVE_AREAS = {MemorySize.XSAVE, MemorySize.XSAVE64}
_FXSAVE_AREAS = {MemorySize.FXSAVE_512BYTE, MemorySize.FXSAVE64_512BYTE}
_FXSAVE_NOTE = "the area's last 96 bytes are reserved and usually left alone"
_ALWAYS_SAVE = {Mnemonic.XSAVE, Mnemonic.XSAVE64}
_RESTORE = {Mnemonic.XRSTOR, Mnemonic.XRSTOR64, Mnemonic.XRSTORS, Mnemonic.XRSTORS64}

#: End of each XSAVE component in the standard format, where Intel's CPUs put it (CPUID.0DH).
_XSAVE_ENDS = {2: 832, 3: 1024, 4: 1088, 5: 1152, 6: 1664, 7: 2688, 9: 2696, 17: 2816, 18: 11008}
_XSAVE_HEADER = 512
_XSAVE_HEADER_END = 576


def plain_operand(instruction: Instruction, used: UsedMemory, *, explicit: bool) -> Operand | None:
    """What :func:`used_accesses` gives, if it is one access whose address only takes registers.

    That is nearly every one; it need be worked out but once for an instruction that is met again
    and again.
    """
    kind = _KINDS.get(used.access)
    if kind is None or used.vsib_size or vector.is_masked(instruction):
        return None
    size, role, note = MemorySizeInfo(used.memory_size).size, Role.OPERAND, ""
    if instruction.is_string_instruction:
        if instruction.has_rep_prefix or instruction.has_repne_prefix:
            return None
        size = MemorySizeInfo(instruction.memory_size).size
        role = Role.STRING_DESTINATION if used.base in _DESTINATIONS else Role.STRING_SOURCE
    elif not explicit and used.segment == Register.SS and used.base in _STACK_NUMBERS:
        if instruction.code_size != CodeSize.CODE64:
            return None  # the width of the stack is then a matter of SS
        role = Role.STACK
    elif (
        not size
        or used.access in _CONDITIONAL
        or instruction.mnemonic in _BIT_TESTS
        or instruction.mnemonic in _CACHE_LINE
        or used.memory_size in _XSAVE_AREAS
    ):
        return None
    elif used.memory_size in _FXSAVE_AREAS:
        note = _FXSAVE_NOTE
    displacement = 0 if instruction.is_string_instruction else used.displacement
    return Operand(
        used.segment,
        used.base,
        used.index,
        used.scale,
        displacement,
        used.address_size,
        size,
        kind,
        role,
        note,
    )


def used_accesses(
    context: CodeContext, instruction: Instruction, used: UsedMemory, *, explicit: bool
) -> list[MemoryAccess]:
    """The accesses of one used memory location; ``explicit`` if it is a ModRM or moffs operand."""
    kind = _KINDS.get(used.access)
    if kind is None:
        return []
    if used.vsib_size:
        return vector.gather(context, instruction, used, kind)
    if vector.is_masked(instruction):
        return vector.masked(context, instruction, used, kind)
    if instruction.is_string_instruction:
        return _string(context, instruction, used, kind)
    if not explicit and used.segment == Register.SS and used.base in _STACK_NUMBERS:
        return [_stack(context, used, kind)]
    return _operand(context, instruction, used, kind)


def _operand(
    context: CodeContext, instruction: Instruction, used: UsedMemory, kind: AccessKind
) -> list[MemoryAccess]:
    displacement = used.displacement
    size = MemorySizeInfo(used.memory_size).size
    certain, note, role = used.access not in _CONDITIONAL, "", Role.OPERAND
    if not certain:
        note = "only if its condition holds"
    mnemonic = instruction.mnemonic
    if mnemonic in _BIT_TESTS and instruction.op_kind(1) == OpKind.REGISTER:
        displacement += _bit_string_step(context, instruction)
    offset = context.offset(used.base, used.index, used.scale, displacement, used.address_size)
    if used.memory_size in _XSAVE_AREAS:
        return _xsave(context, instruction, used.segment, offset, kind)
    if mnemonic in _CACHE_LINE:
        role, note = Role.CACHE_LINE, "faults like a load; KVM's emulator skips it"
    elif used.memory_size in _FXSAVE_AREAS:
        note = _FXSAVE_NOTE
    elif not size:
        size, certain = 1, False
        note = "its size depends on configuration that is not known"
    return [context.access(used.segment, offset, size, kind, role, note=note, certain=certain)]


def _bit_string_step(context: CodeContext, instruction: Instruction) -> int:
    """How far a signed bit offset moves the operand: whole operands, in bytes."""
    register = instruction.op1_register
    size = RegisterInfo(register).size
    bit = sign_extend(context.register(register) or 0, size * 8)
    return (bit // (size * 8)) * size


def _stack(context: CodeContext, used: UsedMemory, kind: AccessKind) -> MemoryAccess:
    pointer = context.state.gprs[_STACK_NUMBERS[used.base]]
    step = sign_extend(used.displacement, _ADDRESS_BITS[used.address_size])
    return context.access(
        Register.SS,
        (pointer + step) & ((1 << context.stack_bits) - 1),
        MemorySizeInfo(used.memory_size).size,
        kind,
        Role.STACK,
    )


def _string(
    context: CodeContext, instruction: Instruction, used: UsedMemory, kind: AccessKind
) -> list[MemoryAccess]:
    """The next element, and the span of all that are left if the instruction repeats."""
    size = MemorySizeInfo(instruction.memory_size).size
    offset = context.register(used.base) or 0
    role = Role.STRING_DESTINATION if used.base in _DESTINATIONS else Role.STRING_SOURCE
    if not (instruction.has_rep_prefix or instruction.has_repne_prefix):
        return [context.access(used.segment, offset, size, kind, role)]
    count = context.register(_COUNTERS[used.address_size]) or 0
    if not count:
        return []
    low = offset - (count - 1) * size if context.state.rflags & X86_EFLAGS_DF else offset
    length = count * size
    note = f"{count:#x} elements left" if count > 1 else "the last element"
    if count > 1 and instruction.mnemonic in _COMPARING:
        note += ", or fewer: the comparison may end it"
    top = 1 << _ADDRESS_BITS[used.address_size]
    if low < 0 or low + length > top:
        low, length = 0, top
        note += "; the address wraps around on the way"
    span = (context.linear(used.segment, low), length)
    return [context.access(used.segment, offset, size, kind, role, note=note, span=span)]


def _xsave(
    context: CodeContext, instruction: Instruction, segment: int, offset: int, kind: AccessKind
) -> list[MemoryAccess]:
    """The header, the legacy region and the extended components of an XSAVE area."""
    state = context.state
    requested = state.gprs[0] & 0xFFFF_FFFF | (state.gprs[2] & 0xFFFF_FFFF) << 32
    if state.xcr0 is not None:
        requested &= state.xcr0
    restores = instruction.mnemonic in _RESTORE
    body = AccessKind.READ if restores else AccessKind.WRITE
    header_size = 64 if restores else 8 if kind is AccessKind.READ_WRITE else 16
    listed = [
        context.access(
            segment,
            offset + _XSAVE_HEADER,
            header_size,
            kind,
            Role.OPERAND,
            note="XSAVE header",
        )
    ]
    if requested & 0b111:
        saves_all = instruction.mnemonic in _ALWAYS_SAVE and requested & 0b11 == 0b11
        listed.append(
            context.access(
                segment,
                offset,
                _XSAVE_HEADER,
                body,
                Role.OPERAND,
                note="legacy region" + ("" if saves_all else ", as far as components are in use"),
                certain=saves_all,
            )
        )
    end = max((_XSAVE_ENDS.get(n, 0) for n in range(2, 64) if requested >> n & 1), default=0)
    if end > _XSAVE_HEADER_END:
        why = "XCR0" if state.xcr0 is None else "the CPU's layout"
        listed.append(
            context.access(
                segment,
                offset + _XSAVE_HEADER_END,
                end - _XSAVE_HEADER_END,
                body,
                Role.OPERAND,
                note=f"extended components, at most; their extent depends on {why}",
                certain=False,
            )
        )
    return listed
