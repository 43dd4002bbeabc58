"""The guests: a few instructions for each kind of access.

Each says that it is ready, makes its one access, and reports EAX to a port::

        out   READY, al
    access:
        mov   eax, [rbx]
        out   DONE, eax
        jmp   access

so that a VMM that does nothing but resolve faults sees two exits, and sees the access made again
whenever it runs the guest on.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial

from iced_x86 import BlockEncoder, Code, Instruction, MemoryOperand, Register

from guestfault.conform import places
from guestfault.guest.layout import Mode
from guestfault.x86.registers import UD_VECTOR

__all__ = [
    "ACCESSES",
    "ALL_MODES",
    "LONG_MODES",
    "Access",
    "encode",
    "exception_stub",
    "gate",
    "loop",
    "reporter",
]

ALL_MODES = (Mode.LONG_CPL3, Mode.LONG_CPL0, Mode.REAL)
LONG_MODES = (Mode.LONG_CPL3, Mode.LONG_CPL0)
_READY_LENGTH = 2  # bytes of the first instruction

Instructions = list[Instruction]


@dataclass(frozen=True)
class Access:
    """One kind of access.

    ``code`` gives the instruction that makes it.  ``registers`` are what it wants in which, as
    guest physical addresses, or as they are if they are in ``plain``; RAX holds what is stored.
    The operand is ``at``.  One that ``pushes`` has its stack end behind the operand; ``stack`` is
    where it ends otherwise, and for the exception that is expected, the ``handler``, where that
    ends which CPL 3 switches to.  ``fetches`` makes the target code,
    ``walked`` a page table.

    What must come of it, where it is not ``None``: the ``value`` in EAX, the word in ``memory`` (a
    gpa, and what is there), and what a device is ``sent``.
    """

    name: str
    title: str
    code: Callable[[Mode], Instructions]
    registers: dict[str, int] = field(default_factory=dict)
    plain: frozenset[str] = frozenset()
    modes: tuple[Mode, ...] = ALL_MODES
    at: int = places.OPERAND
    pushes: bool = False
    stack: int | None = None
    handler: int | None = None
    fetches: bool = False
    walked: bool = False
    value: int | None = None
    memory: tuple[int, int] | None = None
    sent: int | None = None


def _address(mode: Mode, name: str) -> MemoryOperand:
    prefix = "R" if mode.is_long else ""
    return MemoryOperand(getattr(Register, prefix + name))


def _load(mode: Mode) -> Instructions:
    return [Instruction.create_reg_mem(Code.MOV_R32_RM32, Register.EAX, _address(mode, "BX"))]


def _store(mode: Mode) -> Instructions:
    return [Instruction.create_mem_reg(Code.MOV_RM32_R32, _address(mode, "BX"), Register.EAX)]


def _add(mode: Mode) -> Instructions:
    return [Instruction.create_mem_reg(Code.ADD_RM32_R32, _address(mode, "BX"), Register.EAX)]


def _push(mode: Mode) -> Instructions:
    if mode.is_long:
        return [Instruction.create_reg(Code.PUSH_R64, Register.RAX)]
    return [Instruction.create_reg(Code.PUSH_R32, Register.EAX)]


def _jump(mode: Mode) -> Instructions:
    if mode.is_long:
        return [Instruction.create_reg(Code.JMP_RM64, Register.RBX)]
    return [Instruction.create_reg(Code.JMP_RM16, Register.BX)]


def _string(make: Callable[[int], Instruction], mode: Mode) -> Instructions:
    return [make(64 if mode.is_long else 16)]


def _undefined(_mode: Mode) -> Instructions:
    return [Instruction.create(Code.UD2)]


def encode(mode: Mode, instructions: Iterable[Instruction], gpa: int) -> bytes:
    """Machine code for an address."""
    encoder = BlockEncoder(64 if mode.is_long else 16)
    for instruction in instructions:
        encoder.add(instruction)
    return encoder.encode(gpa)


def loop(access: Access, mode: Mode) -> tuple[bytes, int, int]:
    """The guest's code, and where in it the access begins and ends."""
    ready = [Instruction.create_i32_reg(Code.OUT_IMM8_AL, places.READY_PORT, Register.AL)]
    made = access.code(mode)
    made[0].ip = 1
    head = len(encode(mode, [*ready, *made], places.CODE))
    done = Instruction.create_i32_reg(Code.OUT_IMM8_EAX, places.DONE_PORT, Register.EAX)
    code = encode(mode, [*ready, *made, done, _back(mode)], places.CODE)
    return code, _READY_LENGTH, head


def reporter(mode: Mode) -> bytes:
    """The code of a target that is jumped into: the report, for ever."""
    done = Instruction.create_i32_reg(Code.OUT_IMM8_EAX, places.DONE_PORT, Register.EAX)
    done.ip = 1
    return encode(mode, [done, _back(mode)], places.OPERAND)


def exception_stub(mode: Mode, vector: int, expected: bool) -> bytes:
    """What an exception runs: its vector to a port, or the report if it is the expected one."""
    if expected:
        return reporter(mode)
    number = Instruction.create_reg_u32(Code.MOV_R8_IMM8, Register.AL, vector)
    say = Instruction.create_i32_reg(Code.OUT_IMM8_AL, places.EXCEPTION_PORT, Register.AL)
    number.ip = 1
    return encode(mode, [number, say, _back(mode)], places.STUBS)


def _back(mode: Mode) -> Instruction:
    return Instruction.create_branch(Code.JMP_REL8_64 if mode.is_long else Code.JMP_REL8_16, 1)


_OPERAND = {"rbx": places.OPERAND}
_INTO = places.THE_PAGE - 2  # two bytes in the sound page before, two in the page
_OUT = places.THE_PAGE + places.PAGE - 2
_STRING = {"rdx": places.STRING_PORT}
_ANSWERED = places.ANSWER * 0x01010101
_movs = partial(_string, Instruction.create_movsd)
_outs = partial(_string, Instruction.create_outsd)
_ins = partial(_string, Instruction.create_insd)


def _all() -> Iterable[Access]:
    at, stored, content = places.OPERAND, places.STORED, places.CONTENT
    yield Access("read", "mov eax, [x]", _load, _OPERAND, value=content)
    yield Access("write", "mov [x], eax", _store, _OPERAND, memory=(at, stored))
    title = "add [x], eax: one instruction that reads and writes"
    yield Access("rmw", title, _add, _OPERAND, memory=(at, content + stored))
    yield Access("exec", "a jump to x", _jump, _OPERAND, fetches=True)
    title = "a push onto a stack that ends in x"
    yield Access("push", title, _push, pushes=True, memory=(at, stored))
    title = "a read of two bytes before x's page and two in it"
    yield Access("read-into", title, _load, {"rbx": _INTO}, at=_INTO, value=content)
    title = "a read of two bytes in x's page and two behind it"
    yield Access("read-out", title, _load, {"rbx": _OUT}, at=_OUT, value=content)
    title = "a write of two bytes before x's page and two in it"
    yield Access("write-into", title, _store, {"rbx": _INTO}, at=_INTO, memory=(_INTO, stored))
    title = "a write of two bytes in x's page and two behind it"
    yield Access("write-out", title, _store, {"rbx": _OUT}, at=_OUT, memory=(_OUT, stored))
    ram, device = places.SCRATCH, places.DEVICE
    registers = {"rsi": at, "rdi": ram}
    yield Access("movs-from", "movs: x to RAM", _movs, registers, memory=(ram, content))
    registers = {"rsi": ram, "rdi": at}
    yield Access("movs-to", "movs: RAM to x", _movs, registers, memory=(at, places.SCRATCHED))
    registers = {"rsi": at, "rdi": device}
    yield Access("movs-to-device", "movs: x to a device", _movs, registers, sent=content)
    registers = {"rsi": device, "rdi": at}
    title = "movs: a device to x"
    yield Access("movs-from-device", title, _movs, registers, memory=(at, _ANSWERED))
    plain = frozenset(_STRING)
    yield Access("outs", "outs: x to a port", _outs, {"rsi": at} | _STRING, plain, sent=content)
    memory = at, _ANSWERED
    yield Access("ins", "ins: a port to x", _ins, {"rdi": at} | _STRING, plain, memory=memory)
    yield from _walks()
    title = "an exception whose stack ends in x"
    yield Access("event", title, _undefined, stack=at + 0x80, handler=UD_VECTOR)


def _walks() -> Iterable[Access]:
    # The entry is the table's first.  Where the access has the offset in its page that the entry
    # has in the table, KVM's emulator can take the address of one for that of the other.
    for suffix, offset, where in (("", 0x128, ""), ("-alias", 0, ", at its entry's offset")):
        walked = {"rbx": places.WALKED + offset}
        plain, at = frozenset(walked), places.SCRATCH + offset
        yield Access(
            f"walk-read{suffix}",
            f"a read through a page table that is x{where}",
            _load,
            walked,
            plain,
            LONG_MODES,
            walked=True,
            value=places.SCRATCHED,
        )
        yield Access(
            f"walk-write{suffix}",
            f"a write through a page table that is x{where}",
            _store,
            walked,
            plain,
            LONG_MODES,
            walked=True,
            memory=(at, places.STORED),
        )


ACCESSES: dict[str, Access] = {access.name: access for access in _all()}
"""By their names."""


def gate(mode: Mode, vector: int, handler: int) -> tuple[int, bytes]:
    """The entry of a vector table, for a handler at CPL 0: where, and its bytes."""
    if not mode.is_long:
        return places.VECTORS + 4 * vector, struct.pack("<HH", handler, 0)
    linear = handler + places.GVA_OFFSET
    low, middle, high = linear & 0xFFFF, linear >> 16 & 0xFFFF, linear >> 32
    return places.IDT + 16 * vector, struct.pack("<HHBBHI4x", low, 0x08, 0, 0x8E, middle, high)
