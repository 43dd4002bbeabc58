"""Every memory access that one x86 instruction makes, from its bytes and the registers.

When KVM_RUN fails with a bare -EFAULT, the vCPU's RIP still points at the instruction that was
stopped, and its registers still hold what the addresses are made of.  The failed access is one of
those listed here (or a read of the guest's own page tables on the way to one of them, which
:mod:`guestfault.x86.paging` names).

How.  iced-x86 knows the operands, explicit and implicit, and their directions; addresses are
computed here.  iced cannot know what depends on contents: elements of gathers
(:mod:`guestfault.x86.vector`), descriptors, gates and task state (:mod:`guestfault.x86.transfer`),
the reach of a bit offset or of a REP count (:mod:`guestfault.x86.operands`).  No operand is
dropped because it is hard: what cannot be computed is listed with ``certain=False`` and the reason.

The order is the one in which the first failure stops the instruction:

1. the fetch of the instruction itself;
2. the permission check of port I/O;
3. reads before writes: PUSH and CALL read their operand before they write the stack, POP reads the
   stack before it writes its operand, as the manuals' pseudo-code and KVM's emulator do;
4. CMPS reads the source (rSI) before the destination (rDI);
5. ENTER alternates between frame pointers read and pushed;
6. a far CALL or an interrupt loads its descriptors before it pushes (in real mode INT pushes before
   it reads the vector, as KVM does); a far RET, IRET, or load of a segment register reads its
   operand before the descriptor that it selects.

Not listed, because no page can be absent for them: LEA, multi-byte NOP, PREFETCH*, CLDEMOTE,
INVLPG.  CLFLUSH, CLFLUSHOPT and CLWB do fault, like a load of one byte.  The fetch of a jump's
target belongs to the next instruction.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

from iced_x86 import (
    Code,
    Instruction,
    InstructionInfoFactory,
    Mnemonic,
    OpKind,
    Register,
    RegisterInfo,
)

from guestfault.x86 import transfer
from guestfault.x86.addressing import CodeContext, Operand, ReadMemory
from guestfault.x86.instruction import decode
from guestfault.x86.memory_access import PAGE_SIZE, AccessKind, MemoryAccess, PagePart, Role
from guestfault.x86.operands import plain_operand, used_accesses
from guestfault.x86.registers import CR0_PG, CR4_CET, CR4_PAE, EFER_LME
from guestfault.x86.state import CpuState

__all__ = [
    "AccessKind",
    "MemoryAccess",
    "PagePart",
    "Role",
    "accesses",
    "data_accesses",
    "instruction_accesses",
]

_INFO = InstructionInfoFactory()

_SEGMENTS = range(Register.ES, Register.GS + 1)
_FAR_POINTER_LOADS = {Mnemonic.LDS, Mnemonic.LES, Mnemonic.LSS, Mnemonic.LFS, Mnemonic.LGS}
_LOOKS = {Mnemonic.LAR: 1, Mnemonic.LSL: 1, Mnemonic.VERR: 0, Mnemonic.VERW: 0}
_IRETS = {Mnemonic.IRET, Mnemonic.IRETD, Mnemonic.IRETQ}
_PORT_IO = {
    *(Mnemonic.IN, Mnemonic.INSB, Mnemonic.INSW, Mnemonic.INSD),
    *(Mnemonic.OUT, Mnemonic.OUTSB, Mnemonic.OUTSW, Mnemonic.OUTSD),
}

#: Their accesses depend on more than the general registers.
_OWN_RULES = {*_FAR_POINTER_LOADS, *_LOOKS, *_IRETS}
_OWN_RULES |= {Mnemonic.RETF, Mnemonic.ENTER, Mnemonic.LLDT, Mnemonic.LTR}
_SYSTEM_REGISTERS = {*_SEGMENTS, Register.CR0, Register.CR3, Register.CR4}

#: Instructions whose memory operand is named by rAX alone, which iced does not list:
#: code -> (address register, bytes, kind, role, whether rAX is a physical address).
_AX, _EAX, _RAX = Register.AX, Register.EAX, Register.RAX
_BY_RAX = {
    **{
        code: (register, 1, AccessKind.READ, Role.CACHE_LINE, False)
        for code, register in (
            *((Code.MONITORW, _AX), (Code.MONITORD, _EAX), (Code.MONITORQ, _RAX)),
            *((Code.MONITORXW, _AX), (Code.MONITORXD, _EAX), (Code.MONITORXQ, _RAX)),
        )
    },
    **{
        code: (register, 64, AccessKind.WRITE, Role.CACHE_LINE, False)
        for code, register in (*((Code.CLZEROW, _AX), (Code.CLZEROD, _EAX), (Code.CLZEROQ, _RAX)),)
    },
    **{
        code: (register, PAGE_SIZE, kind, Role.VMCB, True)
        for code, register, kind in (
            (Code.VMRUNW, _AX, AccessKind.READ_WRITE),
            (Code.VMRUND, _EAX, AccessKind.READ_WRITE),
            (Code.VMRUNQ, _RAX, AccessKind.READ_WRITE),
            (Code.VMLOADW, _AX, AccessKind.READ),
            (Code.VMLOADD, _EAX, AccessKind.READ),
            (Code.VMLOADQ, _RAX, AccessKind.READ),
            (Code.VMSAVEW, _AX, AccessKind.WRITE),
            (Code.VMSAVED, _EAX, AccessKind.WRITE),
            (Code.VMSAVEQ, _RAX, AccessKind.WRITE),
        )
    },
}


def accesses(
    code: bytes,
    state: CpuState,
    *,
    code_size: int | None = None,
    memory: ReadMemory | None = None,
) -> tuple[MemoryAccess, ...]:
    """The accesses of the instruction that starts ``code``, in the order they are made.

    ``code_size`` is 16, 32 or 64, by default as CS says.  ``memory(address, size)`` reads guest
    memory at a linear address, or returns None; it serves to follow selectors and gates, and
    nothing else.  Never raises for any bytes or registers: bytes that are no instruction yield
    their fetch alone.

    >>> state = CpuState(gprs=(0,) * 14 + (0xFFDCE000, 0), rip=0xFFFD1CB5)
    >>> for access in accesses(bytes.fromhex("41817e285f465648"), state):
    ...     print(access)
    fetch of 8 bytes at 0xfffd1cb5 (instruction fetch)
    read of 4 bytes at 0xffdce028 (operand)
    """
    context = CodeContext(state, code_size or state.code_size, memory)
    instruction, whole = decode(code, state.rip, context.code_size)
    return instruction_accesses(instruction, context, whole=whole)


def instruction_accesses(
    instruction: Instruction, context: CodeContext, *, whole: bool = True
) -> tuple[MemoryAccess, ...]:
    """The same for an instruction that is decoded already, at the state's RIP."""
    fetch = context.access(
        Register.CS,
        context.state.rip & ((1 << context.code_size) - 1),
        max(instruction.len, 1),
        AccessKind.FETCH,
        Role.FETCH,
        note="" if whole else "its bytes are not all known",
    )
    return (fetch, *data_accesses(instruction, context))


def data_accesses(instruction: Instruction, context: CodeContext) -> tuple[MemoryAccess, ...]:
    """All of them but the fetch; none if the bytes were no instruction."""
    if instruction.is_invalid:
        return ()
    shape = _shape(instruction, instruction.code_size)
    if shape.plain is not None and not context.state.cr4 & CR4_CET:
        return tuple(map(context.operand, shape.plain))
    if shape.vector is not None:
        return (
            *transfer.interrupt(context, shape.vector),
            *_shadow_stack(context, instruction),
        )
    return (
        *_port_check(context, instruction),
        *_operands(context, instruction),
        *_by_rax(context, instruction),
        *_pdptes(context, instruction),
        *_shadow_stack(context, instruction),
    )


class _Shape(NamedTuple):
    """What of an instruction's accesses follows from the instruction alone.

    ``vector`` is that of a software interrupt.  ``plain`` are its accesses in their order if each
    needs the general registers and nothing else, else ``None``.
    """

    vector: int | None
    plain: tuple[Operand, ...] | None


@lru_cache(maxsize=1024)
def _shape(instruction: Instruction, code_size: int) -> _Shape:
    """The shape of an instruction; iced's equality leaves the code size out, so it is given too."""
    vector = transfer.vector_of(instruction)
    mnemonic = instruction.mnemonic
    if (
        vector is not None
        or mnemonic in _PORT_IO
        or instruction.code in _BY_RAX
        or mnemonic in _OWN_RULES
        or instruction.op0_register in _SYSTEM_REGISTERS
        or instruction.is_call_far
        or instruction.is_jmp_far
        or instruction.is_call_far_indirect
        or instruction.is_jmp_far_indirect
    ):
        return _Shape(vector, None)
    operands: list[Operand] = []
    for number, used in enumerate(_INFO.info(instruction).used_memory()):
        explicit = number == 0 and _has_explicit(instruction)
        operand = plain_operand(instruction, used, explicit=explicit)
        if operand is None:
            return _Shape(None, None)
        operands.append(operand)
    return _Shape(None, tuple(sorted(operands, key=lambda operand: operand.kind & 1)))


def _has_explicit(instruction: Instruction) -> bool:
    """Whether an operand is in memory; iced lists it first, unless it is only named (LEA)."""
    return OpKind.MEMORY in (instruction.op0_kind, instruction.op1_kind, instruction.op2_kind)


def _operands(context: CodeContext, instruction: Instruction) -> list[MemoryAccess]:
    """Operands and stack, with the descriptors that they select, in order."""
    explicit = _has_explicit(instruction)
    listed: list[MemoryAccess] = []
    for number, used in enumerate(_INFO.info(instruction).used_memory()):
        listed += used_accesses(context, instruction, used, explicit=explicit and number == 0)
    if instruction.mnemonic == Mnemonic.ENTER:
        return [*listed, _enter_probe(context, instruction, listed)]
    reads = [access for access in listed if not access.kind & 1]
    writes = [access for access in listed if access.kind & 1]
    return reads + _descriptors(context, instruction, reads) + writes


def _descriptors(
    context: CodeContext, instruction: Instruction, reads: list[MemoryAccess]
) -> list[MemoryAccess]:
    """Descriptors that the instruction loads; ``reads`` are what it has read by then."""
    if not context.state.uses_descriptors:
        return []
    mnemonic = instruction.mnemonic
    if instruction.is_call_far_indirect or instruction.is_jmp_far_indirect:
        return transfer.far_transfer(context, instruction, reads[0])
    if instruction.is_call_far or instruction.is_jmp_far:
        return transfer.far_transfer(context, instruction, None)
    if mnemonic in _IRETS or mnemonic == Mnemonic.RETF:
        return transfer.interrupt_return(context, instruction, reads)
    if mnemonic in (Mnemonic.MOV, Mnemonic.POP) and instruction.op0_register in _SEGMENTS:
        selector = _selector(context, instruction, 1, reads)
        return transfer.descriptor(context, selector)
    if mnemonic in _FAR_POINTER_LOADS:
        address = reads[0].address
        at = None if address is None else address + reads[0].size - 2
        return transfer.descriptor(context, context.load(at, 2))
    if mnemonic in _LOOKS:
        selector = _selector(context, instruction, _LOOKS[mnemonic], reads)
        return transfer.descriptor(context, selector, marks=False)
    if mnemonic in (Mnemonic.LLDT, Mnemonic.LTR):
        selector = _selector(context, instruction, 0, reads)
        listed = transfer.descriptor(context, selector, system=True, marks=False)
        if listed and mnemonic == Mnemonic.LTR:
            listed += transfer.descriptor(context, selector, kind=AccessKind.WRITE, marks=False)
        return listed
    return []


def _selector(
    context: CodeContext, instruction: Instruction, operand: int, reads: list[MemoryAccess]
) -> int | None:
    """The selector in a register operand, or in the memory that was just read."""
    if reads:
        return context.load(reads[0].address, 2)
    return context.selector(instruction.op_register(operand))


def _enter_probe(
    context: CodeContext, instruction: Instruction, pushes: list[MemoryAccess]
) -> MemoryAccess:
    """ENTER page-faults if the new top of the stack could not be written (SDM, ENTER)."""
    width = pushes[0].size
    depth = width * sum(access.kind.writes for access in pushes) + instruction.immediate16
    return context.stack(
        -depth,
        width,
        AccessKind.WRITE,
        note="probed by a CPU, not by KVM's emulator; nothing is written",
        certain=False,
    )


def _port_check(context: CodeContext, instruction: Instruction) -> list[MemoryAccess]:
    mnemonic = instruction.mnemonic
    if mnemonic not in _PORT_IO:
        return []
    if mnemonic in (Mnemonic.IN, Mnemonic.OUT):
        port_operand, data_operand = (1, 0) if mnemonic == Mnemonic.IN else (0, 1)
        size = RegisterInfo(instruction.op_register(data_operand)).size
        if instruction.op_kind(port_operand) == OpKind.IMMEDIATE8:
            return transfer.io_bitmap(context, instruction.immediate8, size)
    else:
        size = 1 if mnemonic in (Mnemonic.INSB, Mnemonic.OUTSB) else 2
        size = 4 if mnemonic in (Mnemonic.INSD, Mnemonic.OUTSD) else size
    return transfer.io_bitmap(context, context.register(Register.DX) or 0, size)


def _by_rax(context: CodeContext, instruction: Instruction) -> list[MemoryAccess]:
    if instruction.code not in _BY_RAX:
        return []
    register, size, kind, role, physical = _BY_RAX[instruction.code]
    address = context.register(register) or 0
    if physical:
        page = address & -PAGE_SIZE
        return [MemoryAccess(page, size, kind, role, "physical address", physical=True)]
    if role is Role.CACHE_LINE and size > 1:
        address &= -size
    segment = instruction.segment_prefix or Register.DS
    return [context.access(segment, address, size, kind, role)]


def _pdptes(context: CodeContext, instruction: Instruction) -> list[MemoryAccess]:
    """A write of CR0, CR3 or CR4 that leaves PAE paging on loads its four PDPTEs."""
    if instruction.mnemonic != Mnemonic.MOV:
        return []
    target = instruction.op0_register
    if target not in (Register.CR0, Register.CR3, Register.CR4):
        return []
    state = context.state
    value = context.register(instruction.op1_register) or 0
    cr0 = value if target == Register.CR0 else state.cr0
    cr3 = value if target == Register.CR3 else state.cr3
    cr4 = value if target == Register.CR4 else state.cr4
    if not (cr0 & CR0_PG and cr4 & CR4_PAE) or state.efer & EFER_LME or state.long_mode:
        return []
    return [
        MemoryAccess(
            cr3 & 0xFFFF_FFE0,
            32,
            AccessKind.READ,
            Role.PDPTES,
            "physical address",
            certain=target == Register.CR3,
            physical=True,
        )
    ]


def _shadow_stack(context: CodeContext, instruction: Instruction) -> list[MemoryAccess]:
    """With CET enabled, calls push to and returns pop from the shadow stack."""
    if not context.state.cr4 & CR4_CET:
        return []
    calls = instruction.mnemonic in (Mnemonic.CALL, Mnemonic.INT, Mnemonic.INT3)
    returns = instruction.mnemonic in (Mnemonic.RET, Mnemonic.RETF) or (
        instruction.mnemonic in _IRETS
    )
    if not calls and not returns:
        return []
    kind = AccessKind.WRITE if calls else AccessKind.READ
    why = "if shadow stacks are on; SSP is not known"
    return [context.unknown(8, kind, Role.SHADOW_STACK, why)]
