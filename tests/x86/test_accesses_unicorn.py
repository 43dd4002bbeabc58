"""Our account of what an instruction accesses, against a processor that executes it.

Each row is run in Unicorn with a hook on every read and write, from the same registers and memory
that :func:`accesses` is given.  The bytes observed must be exactly those that we call certain,
except where we call more of them possible, and except where TCG is known to do less than hardware:
such rows say how, in ``looser``, and then only what was observed is checked.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import pytest
import unicorn
import unicorn.x86_const as ux

from guestfault.x86.accesses import AccessKind, MemoryAccess, accesses
from guestfault.x86.instruction import decode, instruction_text
from guestfault.x86.segments import Segment
from guestfault.x86.state import GPR_NAMES, CpuState, DescriptorTable

MEMORY = 64 << 20
GDT = 0x30_0000
LDT = 0x30_1000
TSS = 0x30_2000
CODE = {16: 0x8000, 32: 0x10_0000, 64: 0x10_0000}
DF = 1 << 10

UC_GPRS = tuple(getattr(ux, f"UC_X86_REG_{name.upper()}") for name in GPR_NAMES)

#: Data segment 10 is unaccessed: loading it sets its accessed bit.  The code segments are accessed,
#: because TCG does not mark those on far transfers, as hardware does.
DESCRIPTORS = (
    0,
    0x00CF_9B00_0000_FFFF,  # 08: 32-bit code
    0x00CF_9200_0000_FFFF,  # 10: data
    0x00AF_9B00_0000_FFFF,  # 18: 64-bit code
    0x00CF_9300_0000_FFFF,  # 20: data, accessed
    0x0030_8900_2000_0067,  # 28: available TSS at 30_2000, two entries wide in long mode
    0,
    0x0030_8200_1000_00FF,  # 38: LDT at 30_1000, two entries wide in long mode
    0,
)


@dataclass(frozen=True)
class Row:
    """One instruction form; ``set`` and ``store`` override registers and memory."""

    bits: int
    mnemonic: str
    code: str
    set: dict[str, int] = field(default_factory=dict)
    store: dict[int, bytes] = field(default_factory=dict)
    looser: str = ""

    def __str__(self) -> str:
        return f"{self.bits}-{self.code.replace(' ', '')}"


def q(value: int) -> bytes:
    return struct.pack("<Q", value)


def d(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def w(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}H", *values)


SP = {16: 0x3040, 32: 0x24_0340, 64: 0x24_0340}
AX = {16: 0x1040, 32: 0x20_0340, 64: 0x20_0340}
BX = {16: 0x2840, 32: 0x23_0340, 64: 0x23_0340}

ROWS = [
    # Plain operands and every way to address them, 64-bit.
    Row(64, "cmp", "41 81 7e 28 5f 46 56 48"),
    Row(64, "mov", "8a 03"),
    Row(64, "mov", "66 8b 03"),
    Row(64, "mov", "8b 03"),
    Row(64, "mov", "48 8b 03"),
    Row(64, "mov", "48 89 03"),
    Row(64, "mov", "c6 03 07"),
    Row(64, "mov", "48 c7 43 10 01 00 00 00"),
    Row(64, "mov", "48 8b 05 00 10 00 00"),
    Row(64, "mov", "67 48 8b 05 00 10 00 00"),
    Row(64, "mov", "48 8b 04 8b"),
    Row(64, "mov", "4a 8b 44 e3 f8", {"r12": (1 << 64) - 0x100}),
    Row(64, "mov", "67 8b 03", {"rbx": 0xFFFF_0000_0023_0340}),
    Row(64, "mov", "67 8b 04 8b", {"rbx": 0x230340, "rcx": 0xFFFF_FFF0}),
    Row(64, "mov", "48 8b 04 25 00 00 20 00"),
    Row(64, "mov", "48 a1 40 03 20 00 00 00 00 00"),
    Row(64, "mov", "a2 40 03 20 00 00 00 00 00"),
    Row(64, "mov", "65 48 8b 04 25 28 00 00 00", {"gs_base": 0x40_0000}),
    Row(64, "mov", "64 48 89 43 08", {"fs_base": 0x50_0000, "rbx": 0x1000}),
    Row(64, "mov", "64 67 8b 43 f8", {"fs_base": 0x50_0000, "rbx": 0x1000}),
    Row(64, "mov", "48 8b 03", {"rbx": 0x23_0FFD}),
    Row(64, "mov", "89 03", {"rbx": 0x23_0FFF}),
    Row(64, "movzx", "0f b6 03"),
    Row(64, "movzx", "0f b7 03"),
    Row(64, "movsx", "48 0f be 03"),
    Row(64, "movsxd", "48 63 03"),
    Row(64, "movbe", "0f 38 f0 03"),
    Row(64, "movbe", "0f 38 f1 03"),
    Row(64, "movnti", "48 0f c3 03"),
    # Read-modify-write.
    Row(64, "add", "83 03 01"),
    Row(64, "add", "f0 83 03 01"),
    Row(64, "add", "48 03 03"),
    Row(64, "not", "48 f7 13"),
    Row(64, "neg", "f6 1b"),
    Row(64, "inc", "66 ff 03"),
    Row(64, "shl", "48 d1 23"),
    Row(64, "rol", "48 c1 03 05"),
    Row(64, "shld", "48 0f a4 0b 05"),
    Row(64, "test", "f6 03 01"),
    Row(64, "imul", "48 0f af 03"),
    Row(64, "mul", "48 f7 23"),
    Row(64, "div", "f7 33", {"rdx": 0}, {BX[64]: d(7)}),
    Row(64, "xchg", "48 87 0b"),
    Row(64, "xadd", "0f c1 0b"),
    Row(64, "xadd", "f0 48 0f c1 0b"),
    Row(64, "cmpxchg", "0f b1 0b", {"rax": 0}),
    Row(64, "cmpxchg", "f0 0f b1 0b", {"rax": 5}),
    Row(64, "cmpxchg", "48 0f b1 0b", {"rax": 5}),
    Row(64, "cmpxchg8b", "f0 0f c7 0e", {"rax": 0, "rdx": 0}),
    Row(64, "cmpxchg8b", "0f c7 0e"),
    Row(64, "cmpxchg16b", "48 0f c7 0e"),
    Row(64, "cmove", "48 0f 44 0b"),
    Row(64, "cmovne", "48 0f 45 0b"),
    Row(64, "sete", "0f 94 03"),
    Row(64, "bsf", "48 0f bc 03"),
    Row(64, "popcnt", "f3 48 0f b8 03"),
    Row(64, "crc32", "f2 48 0f 38 f1 03"),
    # Bit strings.
    Row(64, "bt", "48 0f a3 0b", {"rcx": 1000}),
    Row(64, "bts", "48 0f ab 0b", {"rcx": (1 << 64) - 1}),
    Row(64, "btr", "0f b3 0b", {"rcx": 0xFFFF_FFFF}),
    Row(64, "btc", "66 0f bb 0b", {"rcx": 0x8000}),
    Row(64, "bt", "0f ba 23 1f"),
    Row(64, "bts", "f0 48 0f ba 2b 3f"),
    # No access at all.
    Row(64, "lea", "48 8d 43 08"),
    Row(64, "nop", "0f 1f 43 08"),
    Row(64, "prefetchnta", "0f 18 03"),
    Row(64, "prefetchw", "0f 0d 0b"),
    Row(64, "invlpg", "0f 01 3b"),
    Row(64, "add", "48 01 c8"),
    Row(64, "clflush", "0f ae 3b", looser="does not load from the line"),
    # The stack.
    Row(64, "push", "50"),
    Row(64, "push", "66 50"),
    Row(64, "push", "6a 01"),
    Row(64, "push", "68 01 00 00 00"),
    Row(64, "push", "ff 33"),
    Row(64, "push", "ff 34 24"),
    Row(64, "push", "0f a8"),
    Row(64, "pop", "58"),
    Row(64, "pop", "8f 03"),
    Row(64, "pop", "8f 04 24"),
    Row(64, "pop", "8f 44 24 08"),
    Row(64, "pop", "5c"),
    Row(64, "pushfq", "9c"),
    Row(64, "popfq", "9d"),
    Row(64, "call", "e8 00 00 00 00"),
    Row(64, "call", "ff 13"),
    Row(64, "call", "ff 54 24 08"),
    Row(64, "jmp", "ff 23"),
    Row(64, "ret", "c3"),
    Row(64, "ret", "c2 10 00"),
    Row(64, "enter", "c8 20 00 00"),
    Row(64, "enter", "c8 20 00 01"),
    Row(64, "enter", "c8 20 00 03"),
    Row(64, "leave", "c9"),
    Row(64, "iretq", "48 cf", {}, {SP[64]: q(0x100000) + q(0x18) + q(2) + q(0x240340) + q(0x20)}),
    Row(64, "ret", "48 cb", {}, {SP[64]: q(0x100000) + q(0x18)}),
    # String instructions.
    Row(64, "movsb", "a4"),
    Row(64, "movsq", "48 a5"),
    Row(64, "movsq", "48 a5", {"rflags": 2 | DF}),
    Row(64, "rep", "f3 a4", {"rcx": 5}),
    Row(64, "rep", "f3 48 a5", {"rcx": 5, "rflags": 2 | DF}),
    Row(64, "rep", "67 f3 a5", {"rcx": 0xF_0000_0003}),
    Row(64, "rep", "f3 a4", {"rcx": 0}),
    Row(64, "rep", "f3 aa", {"rcx": 9}),
    Row(64, "stosd", "ab"),
    Row(64, "lodsq", "48 ad"),
    Row(64, "rep", "f3 ac", {"rcx": 3}),
    Row(64, "scasb", "ae"),
    Row(64, "repe", "f3 af", {"rcx": 4, "rax": 0}),
    Row(64, "repne", "f2 ae", {"rcx": 4, "rax": 0}),
    Row(64, "cmpsb", "a6"),
    Row(64, "repe", "f3 a7", {"rcx": 4}),
    Row(64, "movsb", "64 a4", {"fs_base": 0x1000}),
    Row(64, "insb", "6c"),
    Row(64, "outsd", "6f"),
    Row(64, "xlat", "d7", {"rax": 0x1234_5680}),
    # x87, SSE and state areas.
    Row(64, "fld", "d9 03"),
    Row(64, "fld", "db 2b"),
    Row(64, "fstp", "db 3b"),
    Row(64, "fild", "df 2b"),
    Row(64, "fbstp", "df 33"),
    Row(64, "fnstcw", "d9 3b"),
    Row(64, "fldcw", "d9 2b"),
    Row(64, "fnstenv", "d9 33"),
    Row(64, "fldenv", "d9 23", looser="skips reserved words"),
    Row(64, "fnsave", "dd 33"),
    Row(64, "frstor", "dd 23", looser="skips reserved words"),
    Row(64, "movaps", "0f 28 03"),
    Row(64, "movups", "0f 11 43 07"),
    Row(64, "movss", "f3 0f 10 03"),
    Row(64, "movq", "66 0f d6 03"),
    Row(64, "movlps", "0f 13 03"),
    Row(64, "pinsrw", "66 0f c4 03 01"),
    Row(64, "paddd", "66 0f fe 03"),
    Row(64, "cvtsi2sd", "f2 48 0f 2a 03"),
    Row(64, "ldmxcsr", "0f ae 13", {}, {BX[64]: d(0x1F80)}),
    Row(64, "stmxcsr", "0f ae 1b"),
    Row(64, "fxsave", "0f ae 03", looser="leaves reserved bytes alone"),
    Row(
        64,
        "fxrstor",
        "0f ae 0b",
        {},
        {BX[64]: bytes(24) + d(0x1F80)},
        looser="leaves reserved bytes alone",
    ),
    Row(64, "maskmovdqu", "66 0f f7 c1", looser="writes no byte, as XMM1 is zero"),
    # System tables and descriptors.
    Row(64, "sgdt", "0f 01 03"),
    Row(64, "sidt", "0f 01 0b"),
    Row(64, "lgdt", "0f 01 13", {}, {BX[64]: w(0xFF) + q(GDT)}),
    Row(64, "lidt", "0f 01 1b"),
    Row(64, "smsw", "0f 01 23"),
    Row(64, "sldt", "0f 00 03"),
    Row(64, "str", "0f 00 0b"),
    Row(64, "mov", "8e d8", {"rax": 0x10}),
    Row(64, "mov", "8e d8", {"rax": 0x20}),
    Row(64, "mov", "8e d8", {"rax": 0}),
    Row(64, "mov", "8e 03", {}, {BX[64]: w(0x10)}),
    Row(64, "lldt", "0f 00 d0", {"rax": 0x38}),
    Row(64, "ltr", "0f 00 d8", {"rax": 0x28}),
    Row(64, "verr", "0f 00 e0", {"rax": 0x10}),
    Row(64, "lar", "0f 02 c8", {"rax": 0x10}),
    Row(64, "lsl", "0f 03 c8", {"rax": 0x10}),
    Row(64, "call", "48 ff 1b", {}, {BX[64]: q(0x10_0000) + w(0x18)}),
    Row(64, "jmp", "ff 2b", {}, {BX[64]: d(0x10_0000) + w(0x18)}),
    # 32-bit protected mode.
    Row(32, "mov", "8b 03"),
    Row(32, "mov", "8b 44 8b fc"),
    Row(32, "mov", "67 8b 40 10", {"rbx": 0xFFF8, "rsi": 0x1_0020}),
    Row(32, "mov", "67 66 89 07", {"rbx": 0x1_8000}),
    Row(32, "mov", "a1 40 03 20 00"),
    Row(32, "mov", "8b 83 00 00 f0 ff"),
    Row(32, "mov", "8b 03", {"rbx": 0x23_0FFE}),
    Row(32, "pushad", "60"),
    Row(32, "popad", "61"),
    Row(32, "pusha", "66 60"),
    Row(32, "popa", "66 61"),
    Row(32, "push", "50"),
    Row(32, "push", "66 ff 33"),
    Row(32, "push", "0e"),
    Row(32, "push", "16"),
    Row(32, "pop", "8f 44 24 04"),
    Row(32, "pop", "1f", {}, {SP[32]: d(0x10)}),
    Row(32, "pushfd", "9c"),
    Row(32, "enter", "c8 10 00 02"),
    Row(32, "leave", "c9"),
    Row(32, "bound", "62 0b", {"rcx": 0}, {BX[32]: d(0, 9)}),
    Row(32, "lds", "c5 0b", {}, {BX[32]: d(0x1234) + w(0x10)}),
    Row(32, "lss", "0f b2 0b", {}, {BX[32]: d(0x1234) + w(0x10)}),
    Row(32, "call", "9a 00 00 10 00 08 00"),
    Row(32, "jmp", "ea 00 00 10 00 08 00"),
    Row(32, "jmp", "ff 2b", {}, {BX[32]: d(0x10_0000) + w(8)}),
    Row(32, "ret", "cb", {}, {SP[32]: d(0x10_0000, 8)}),
    Row(32, "ret", "ca 10 00", {}, {SP[32]: d(0x10_0000, 8)}),
    Row(32, "iretd", "cf", {}, {SP[32]: d(0x10_0000, 8, 2)}),
    Row(32, "mov", "8e c0", {"rax": 0x10}),
    Row(32, "lldt", "0f 00 d0", {"rax": 0x38}),
    Row(32, "ltr", "0f 00 d8", {"rax": 0x28}),
    Row(32, "rep", "f3 a5", {"rcx": 3}),
    Row(32, "rep", "67 f3 a4", {"rcx": 3, "rsi": 0x1_2000, "rdi": 0x1_3000}),
    Row(32, "repe", "f3 a6", {"rcx": 4}),
    Row(32, "bts", "0f ab 0b", {"rcx": 0xFFFF_FF00}),
    Row(32, "xlat", "d7"),
    Row(32, "sgdt", "0f 01 03"),
    Row(32, "cmpxchg8b", "0f c7 0e"),
    # Real mode.
    Row(16, "mov", "8b 07"),
    Row(16, "mov", "8b 00"),
    Row(16, "mov", "8b 42 fe"),
    Row(16, "mov", "8b 07", {"ds": 0x100}),
    Row(16, "mov", "26 88 07", {"es": 0x200}),
    Row(16, "mov", "36 8b 07", {"ss": 0x80}),
    Row(16, "mov", "8b 46 04", {"ss": 0x80}),
    Row(16, "mov", "67 66 8b 04 cb", {"rcx": 3}),
    Row(16, "mov", "8b 80 00 f0", {"rbx": 0x1800, "rsi": 0x0900}),
    Row(16, "mov", "a1 34 12"),
    Row(16, "push", "50", {"ss": 0x100}),
    Row(16, "push", "66 50"),
    Row(16, "push", "50", {"rsp": 0}),
    Row(16, "push", "68 34 12"),
    Row(16, "pop", "8f 07"),
    Row(16, "pop", "07"),
    Row(16, "pusha", "60"),
    Row(16, "popa", "61"),
    Row(16, "pushf", "9c"),
    Row(16, "call", "e8 00 00"),
    Row(16, "ret", "c3"),
    Row(16, "call", "9a 34 12 00 00"),
    Row(16, "call", "ff 1f", {}, {BX[16]: w(0x1234, 0)}),
    Row(16, "jmp", "ff 2f", {}, {BX[16]: w(0x1234, 0)}),
    Row(16, "ret", "cb"),
    Row(16, "iret", "cf"),
    Row(16, "enter", "c8 10 00 02"),
    Row(16, "leave", "c9"),
    Row(16, "lds", "c5 0f"),
    Row(16, "movsb", "a4", {"ds": 0x100, "es": 0x200}),
    Row(16, "rep", "f3 a5", {"rcx": 0x1_0003, "es": 0x200}),
    Row(
        16,
        "rep",
        "f3 a4",
        {"rcx": 4, "rdi": 0xFFFE, "es": 0x200},
        looser="wraps: its span is all 64 KiB",
    ),
    Row(16, "rep", "67 f3 aa", {"rcx": 4, "rdi": 0x8100}),
    Row(16, "scasw", "af"),
    Row(16, "xlat", "d7", {"rbx": 0xFFF0, "rax": 0x55}),
    Row(16, "bts", "0f ab 07", {"rax": 0xFFF0}),
    Row(16, "lgdt", "0f 01 17"),
    Row(16, "fnsave", "dd 37"),
    Row(16, "outsb", "6e"),
]


def registers(row: Row) -> dict[str, int]:
    step, first = (0x800, 0x1040) if row.bits == 16 else (0x1_0000, 0x20_0340)
    values = {name: first + step * n for n, name in enumerate(GPR_NAMES)}
    if row.bits != 64:
        values.update((name, 0) for name in GPR_NAMES[8:])
    return {**values, "rflags": 2, **row.set}


def state_of(row: Row) -> CpuState:
    values = registers(row)
    big, long = row.bits == 32, row.bits == 64
    limit = 0xFFFF if row.bits == 16 else 0xFFFF_FFFF

    def segment(name: str, selector: int) -> Segment:
        real = row.bits == 16
        selector = values.get(name, 0 if real else selector)
        base = selector << 4 if real else values.get(f"{name}_base", 0)
        return Segment(selector, base, limit, type=3, s=1, present=1, db=big)

    return CpuState(
        gprs=tuple(values[name] for name in GPR_NAMES),
        rip=CODE[row.bits],
        rflags=values["rflags"],
        cs=Segment(0 if row.bits == 16 else 8, 0, limit, type=11, s=1, present=1, l=long, db=big),
        ss=segment("ss", 0x10),
        ds=segment("ds", 0x10),
        es=segment("es", 0x10),
        fs=segment("fs", 0x10),
        gs=segment("gs", 0x10),
        gdt=DescriptorTable(GDT, 8 * len(DESCRIPTORS) - 1),
        cr0=0x10 if row.bits == 16 else 0x11,
        efer=0x500 if long else 0,
    )


def execute(row: Row) -> tuple[set[int], set[int], Any]:
    """Run it; the bytes read, the bytes written, and a reader of the memory as it was before."""
    mode = {16: unicorn.UC_MODE_16, 32: unicorn.UC_MODE_32, 64: unicorn.UC_MODE_64}[row.bits]
    uc = unicorn.Uc(unicorn.UC_ARCH_X86, mode)
    uc.mem_map(0, MEMORY)
    uc.mem_write(GDT, struct.pack(f"<{len(DESCRIPTORS)}Q", *DESCRIPTORS))
    for address, data in row.store.items():
        uc.mem_write(address, data)
    code = bytes.fromhex(row.code)
    uc.mem_write(CODE[row.bits], code)
    values = registers(row)
    if row.bits != 16:
        uc.reg_write(ux.UC_X86_REG_GDTR, (0, GDT, 8 * len(DESCRIPTORS) - 1, 0))
    if row.bits == 32:  # Unicorn starts with a 16-bit stack segment.
        uc.reg_write(ux.UC_X86_REG_CS, 0x08)
        uc.reg_write(ux.UC_X86_REG_SS, 0x20)
    for number, name in zip(UC_GPRS, GPR_NAMES, strict=True):
        if row.bits == 64:
            uc.reg_write(number, values[name])
        elif name[1:].isalpha():
            uc.reg_write(getattr(ux, f"UC_X86_REG_E{name[1:].upper()}"), values[name])
    for name in ("ds", "es", "ss"):
        if name in values:
            uc.reg_write(getattr(ux, f"UC_X86_REG_{name.upper()}"), values[name])
    for name in ("fs_base", "gs_base"):
        if name in values:
            uc.reg_write(getattr(ux, f"UC_X86_REG_{name.upper()}"), values[name])
    uc.reg_write(ux.UC_X86_REG_EFLAGS, values["rflags"])
    before = bytes(uc.mem_read(0, 8 << 20))

    read: set[int] = set()
    written: set[int] = set()

    def observe(_uc: Any, access: int, address: int, size: int, _value: int, _data: Any) -> None:
        target = written if access == unicorn.UC_MEM_WRITE else read
        if GDT <= address < LDT:
            # Of a descriptor TCG writes, and of its upper half reads, only the dword that matters.
            address, size = address & -8, 8
        target.update(range(address, address + size))

    uc.hook_add(unicorn.UC_HOOK_MEM_READ | unicorn.UC_HOOK_MEM_WRITE, observe)
    uc.hook_add(unicorn.UC_HOOK_INSN, lambda *_: 0, None, 1, 0, ux.UC_X86_INS_IN)
    repeats = row.mnemonic in ("rep", "repe", "repne")
    uc.emu_start(CODE[row.bits], CODE[row.bits] + len(code), count=0 if repeats else 1)

    def memory(address: int, size: int) -> bytes | None:
        data = before[address : address + size]
        return data if len(data) == size else None

    return read, written, memory


def covered(listed: Iterable[MemoryAccess]) -> set[int]:
    """Every byte of the accesses; a repeating one counts with all that it may still touch."""
    covered: set[int] = set()
    for access in listed:
        assert access.address is not None
        start, size = access.span or (access.address, access.size)
        covered.update(range(start, start + size))
    return covered


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_same_bytes_as_the_processor(row: Row) -> None:
    read, written, memory = execute(row)
    code = bytes.fromhex(row.code)
    instruction, _ = decode(code, CODE[row.bits], row.bits)
    assert row.mnemonic in instruction_text(instruction).split()[:2]
    listed = accesses(code, state_of(row), code_size=row.bits, memory=memory)
    assert listed[0].kind is AccessKind.FETCH
    assert (listed[0].address, listed[0].size) == (CODE[row.bits], len(code))
    ours = [access for access in listed[1:] if access.address is not None]
    for observed, kinds in (
        (read, (AccessKind.READ, AccessKind.READ_WRITE)),
        (written, (AccessKind.WRITE, AccessKind.READ_WRITE)),
    ):
        mine = [access for access in ours if access.kind in kinds]
        certain = covered(access for access in mine if access.certain)
        possible = covered(mine)
        assert observed <= possible, "accessed, but not listed"
        if row.looser:
            continue
        # A comparison may end a repetition before its span does.
        if row.mnemonic not in ("repe", "repne"):
            assert certain <= observed, "listed as certain, but not accessed"


def test_the_table_is_long_enough() -> None:
    assert len({(row.bits, row.code) for row in ROWS}) >= 120
