"""What the CPU reads and writes behind the program's back: descriptors, gates, TSS, I/O bitmap.

Loading a segment register reads a descriptor, an interrupt reads a gate and pushes a frame, port
I/O outside IOPL reads the TSS's bitmap.  These accesses fail like any other, and are the ones that
a disassembler does not show.

A chain is followed as far as it is known.  A selector or a gate that lies in guest memory is read
through :attr:`CodeContext.memory` when there is one; without it the rest of the chain is reported
as uncertain, with the reason.
"""

from __future__ import annotations

from iced_x86 import Code, Instruction, Mnemonic, OpKind, Register

from guestfault.x86.addressing import CodeContext
from guestfault.x86.memory_access import AccessKind, MemoryAccess, Role
from guestfault.x86.registers import X86_EFLAGS_NT

__all__ = ["descriptor", "far_transfer", "interrupt", "interrupt_return", "io_bitmap", "vector_of"]

_READ, _WRITE = AccessKind.READ, AccessKind.WRITE
_VECTORS = {Mnemonic.INT3: 3, Mnemonic.INT1: 1, Mnemonic.INTO: 4}


def descriptor(
    context: CodeContext,
    selector: int | None,
    *,
    kind: AccessKind = _READ,
    system: bool = False,
    marks: bool = True,
    certain: bool = True,
    note: str = "",
) -> list[MemoryAccess]:
    """Reading the descriptor of ``selector``, and setting its accessed bit if it is clear.

    ``system`` descriptors have 16 bytes in long mode.  ``marks`` is False for instructions that
    only look (LAR, LSL, VERR, VERW, LLDT); ``kind`` is a write for LTR, which marks its TSS busy.
    A null selector reads nothing; so does real mode.
    """
    if not context.state.uses_descriptors:
        return []
    size = 16 if system and context.state.long_mode else 8
    if selector is None:
        why = note or "its selector lies in guest memory"
        return [context.unknown(size, kind, Role.DESCRIPTOR, why)]
    if not selector & 0xFFFC:
        return []
    table = context.state.ldt if selector & 4 else context.state.gdt
    name = "LDT" if selector & 4 else "GDT"
    index = selector & 0xFFF8
    notes = [note] if note else []
    notes.append(f"selector {selector:#x} in the {name}")
    beyond = index + 7 > table.limit
    if beyond:
        notes.append("beyond its limit: #GP in the guest, no access is made")
        certain = False
    where = table.base + index
    read = context.system(
        where,
        size,
        kind,
        Role.DESCRIPTOR,
        note="; ".join(notes),
        certain=certain,
        refused=beyond,
    )
    high = context.load(read.address, 8)
    if not marks or (high is not None and high >> 40 & 1):
        return [read]
    set_bit = context.system(
        where,
        8,
        _WRITE,
        Role.DESCRIPTOR,
        note="sets the accessed bit" + ("" if high is not None else " if it is clear"),
        certain=certain and high is not None,
        refused=beyond,
    )
    return [read, set_bit]


def io_bitmap(context: CodeContext, port: int, size: int) -> list[MemoryAccess]:
    """Permission check of port I/O by code whose privilege is below IOPL, or in virtual-8086."""
    state = context.state
    if not state.protected or (state.cpl <= state.iopl and not state.virtual8086):
        return []
    start = context.system(
        state.tr.base + 0x66,
        2,
        _READ,
        Role.TSS,
        note="where its I/O bitmap starts",
        refused=not state.tr.present or state.tr.limit < 0x67,
    )
    bitmap = context.load(start.address, 2)
    if bitmap is None:
        why = "the bitmap's start lies in guest memory"
        return [start, context.unknown(2, _READ, Role.IO_BITMAP, why)]
    if bitmap + port // 8 + 1 > state.tr.limit:
        return [start]
    note = f"port {port:#x}, {size} wide"
    address = state.tr.base + bitmap + port // 8
    return [start, context.system(address, 2, _READ, Role.IO_BITMAP, note=note)]


def interrupt(context: CodeContext, vector: int, *, error_code: bool = False) -> list[MemoryAccess]:
    """An interrupt or an exception, from the gate to the last push.

    ``error_code`` is whether it pushes one, as some exceptions do in protected mode.
    """
    state = context.state
    if not state.protected:
        pushes = [context.stack(-2 * n, 2, _WRITE) for n in (1, 2, 3)]
        entry = context.system(
            state.idt.base + 4 * vector,
            4,
            _READ,
            Role.INTERRUPT_VECTOR,
            note=f"vector {vector:#x}",
        )
        return [*pushes, entry]
    size = 16 if state.long_mode else 8
    gate = context.system(
        state.idt.base + size * vector,
        size,
        _READ,
        Role.GATE,
        note=f"vector {vector:#x}",
    )
    if size * (vector + 1) - 1 > state.idt.limit:
        beyond = "beyond the IDT's limit: #GP in the guest"
        return [context.unknown(size, _READ, Role.GATE, beyond)._replace(refused=True)]
    entry_value = context.load(gate.address, size)
    if entry_value is None:
        return [gate, *_unknown_gate(context)]
    selector = entry_value >> 16 & 0xFFFF
    code = descriptor(context, selector)
    target = context.load(code[0].address, 8) if code else None
    if target is None:
        return [gate, *code, *_unknown_gate(context)[1:]]
    conforming = bool(target >> 42 & 1)
    new_cpl = state.cpl if conforming else target >> 45 & 3
    if state.long_mode:
        return [gate, *code, *_long_frame(context, entry_value >> 32 & 7, new_cpl, error_code)]
    width = 4 if entry_value >> 43 & 1 else 2
    return [gate, *code, *_protected_frame(context, width, new_cpl, error_code)]


def _unknown_gate(context: CodeContext) -> list[MemoryAccess]:
    """What follows a gate that could not be read: a descriptor, perhaps the TSS, the frame."""
    state = context.state
    why = "the gate lies in guest memory"
    code = context.unknown(8, _READ, Role.DESCRIPTOR, why)
    if state.long_mode:
        inner = context.system(
            state.tr.base + 4, 8, _READ, Role.TSS, note="RSP0, if CPL changes", certain=False
        )
        count, width = 5, 8
    else:
        inner = context.system(
            state.tr.base + 4, 8, _READ, Role.TSS, note="SS0:ESP0, if CPL changes", certain=False
        )
        count, width = 3, 4
    frame = (
        [context.unknown(width, _WRITE, Role.STACK, "the new stack lies in the TSS")]
        if state.cpl
        else [
            context.system(
                _same_stack(context) - width * (n + 1),
                width,
                _WRITE,
                Role.STACK,
                note="if the gate changes neither privilege nor stack",
                certain=False,
            )
            for n in range(count)
        ]
    )
    return [code, inner, *frame]


def _same_stack(context: CodeContext) -> int:
    """Linear address that the frame grows down from when the stack does not change."""
    stack = context.state.gprs[4]
    if context.state.long_mode:
        return stack & ~15
    stack &= (1 << context.stack_bits) - 1
    return context.linear(Register.SS, stack)


def _long_frame(
    context: CodeContext, ist: int, new_cpl: int, error_code: bool
) -> list[MemoryAccess]:
    """SS, RSP, RFLAGS, CS, RIP (and an error code), on a stack from the TSS or the aligned current
    one.
    """
    state = context.state
    reads = []
    top: int | None = _same_stack(context)
    if ist or new_cpl != state.cpl:
        slot = 0x24 + 8 * (ist - 1) if ist else 4 + 8 * new_cpl
        name = f"IST{ist}" if ist else f"RSP{new_cpl}"
        reads = [context.system(state.tr.base + slot, 8, _READ, Role.TSS, note=name)]
        top = context.load(reads[0].address, 8)
    if top is None:
        return [*reads, context.unknown(8, _WRITE, Role.STACK, "the new stack lies in the TSS")]
    top &= ~15
    pushes = range(1, 6 + error_code)
    return [*reads, *(context.system(top - 8 * n, 8, _WRITE, Role.STACK) for n in pushes)]


def _protected_frame(
    context: CodeContext, width: int, new_cpl: int, error_code: bool
) -> list[MemoryAccess]:
    """(SS, ESP,) EFLAGS, CS, EIP (and an error code) of a 32-bit or 16-bit gate."""
    state = context.state
    if new_cpl == state.cpl:
        return [context.stack(-width * n, width, _WRITE) for n in range(1, 4 + error_code)]
    # A 16-bit TSS (types 1 and 3) holds SP and SS as words.
    slot, field = (2 + 4 * new_cpl, 2) if state.tr.type & 8 == 0 else (4 + 8 * new_cpl, 4)
    stack = context.system(
        state.tr.base + slot,
        field + 2,
        _READ,
        Role.TSS,
        note=f"stack pointer and segment of level {new_cpl}",
    )
    value = context.load(stack.address, field + 2)
    selector = None if value is None else value >> (8 * field) & 0xFFFF
    segment = descriptor(context, selector, note="the new stack's")
    loaded = context.load(segment[0].address, 8) if segment else None
    if value is None or loaded is None:
        why = "the new stack lies in the TSS"
        return [stack, *segment, context.unknown(width, _WRITE, Role.STACK, why)]
    base = loaded >> 16 & 0xFF_FFFF | (loaded >> 56) << 24
    top = base + (value & ((1 << 8 * field) - 1))
    count = (9 if state.virtual8086 else 5) + error_code
    frame = (
        context.system(top - width * n, width, _WRITE, Role.STACK) for n in range(1, count + 1)
    )
    return [stack, *segment, *frame]


def far_transfer(
    context: CodeContext, instruction: Instruction, operand: MemoryAccess | None
) -> list[MemoryAccess]:
    """The code descriptor of a far CALL or JMP; ``operand`` is its far pointer in memory, if any.

    What a call gate or a task gate would add depends on the descriptor, and is said in its note.
    """
    selector: int | None
    if operand is not None:
        size = operand.size - 2
        at = None if operand.address is None else operand.address + size
        selector = context.load(at, 2)
    else:
        selector = instruction.far_branch_selector
    note = "code segment; a call gate or task gate here would lead on to others"
    return descriptor(context, selector, note=note)


def interrupt_return(
    context: CodeContext, instruction: Instruction, pops: list[MemoryAccess]
) -> list[MemoryAccess]:
    """What IRET and far RET read after their pops: the outer stack's pointer, then descriptors.

    ``pops`` are their certain stack reads, the instruction pointer first and CS second.
    """
    state = context.state
    if not state.uses_descriptors or len(pops) < 2:
        return []
    width = pops[0].size
    is_iret = instruction.mnemonic in (Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ)
    if is_iret and state.rflags & X86_EFLAGS_NT and not state.long_mode:
        return [context.system(state.tr.base, 2, _READ, Role.TSS, note="back link (NT is set)")]
    selector = context.load(pops[1].address, min(width, 2))
    outer = None if selector is None else (selector & 3) > state.cpl
    certain = outer is True
    accesses: list[MemoryAccess] = []
    after = width * len(pops)
    if instruction.op_count and instruction.op_kind(0) == OpKind.IMMEDIATE16:
        after += instruction.immediate16
    pops_stack = is_iret and context.code_size == 64
    if not pops_stack and outer is not False:
        note = "" if certain else "if it returns to an outer privilege level"
        accesses = [
            context.stack(after + width * n, width, _READ, note=note, certain=certain)
            for n in (0, 1)
        ]
    accesses += descriptor(context, selector, note="code segment" if selector is not None else "")
    stack_pops = pops[4:5] if pops_stack else accesses[1:2] if certain else []
    if stack_pops:
        accesses += descriptor(context, context.load(stack_pops[0].address, 2))
    return accesses


def vector_of(instruction: Instruction) -> int | None:
    """The vector that a software interrupt raises; None for any other instruction.

    INTO counts although it raises #OF only if OF is set.
    """
    if instruction.code == Code.INT_IMM8:
        return instruction.immediate8
    return _VECTORS.get(instruction.mnemonic)
