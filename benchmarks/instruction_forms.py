"""The instruction forms of the accuracy experiment: what each is, and the state it needs.

One form is one encoding with its registers and memory, so that it touches what its group is about.
Forms of 64-bit code run in long mode at CPL 0 and CPL 3, those of 16-bit code in real mode.

The world they are written for (:mod:`locate_machine`) is mapped one to one.  Every general register
points to a page of its own: number n (in encoding order) holds ``0x20_0340 + n * 0x1_0000`` in long
mode and ``0x1040 + n * 0x800`` in real mode.  The stack, from rSP on, is full of :data:`TARGETS`,
where there is a HLT.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field

__all__ = ["FORMS", "GROUPS", "TARGETS", "Form"]

GDT, LDT, TSS, IDT = 0x30_0000, 0x30_1000, 0x30_2000, 0x30_4000
REAL_IDT = 0x5000
CODE = {16: 0x8000, 64: 0x10_0800}
TARGETS = {16: 0x8100, 64: 0x10_0900}
DF, IOPL3 = 1 << 10, 3 << 12

LIMIT = {16: 0xFFFF, 64: (1 << 64) - 1}


@dataclass(frozen=True, eq=False)
class Form:
    """``bytes`` in ``bits``-bit code, with what differs from the usual registers and memory.

    ``at`` is where it lies, ``before`` what runs first to set up registers that only instructions
    can (vector registers).  ``rings`` are the privilege levels at which it makes sense, ``needs`` a
    feature of the processor that not all have, ``idt`` whether exceptions find a handler.
    """

    group: str
    name: str
    bits: int
    bytes: bytes
    set: Mapping[str, int] = field(default_factory=dict)
    store: Mapping[int, bytes] = field(default_factory=dict)
    at: int = 0
    before: bytes = b""
    rings: tuple[int, ...] = (0, 3)
    needs: str = ""
    idt: bool = False

    @property
    def start(self) -> int:
        """Where execution starts."""
        return (self.at or CODE[self.bits]) - len(self.before)

    @property
    def rip(self) -> int:
        """Where the form itself lies."""
        return self.at or CODE[self.bits]

    def __str__(self) -> str:
        return f"{self.bits}: {self.name}"


def q(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}Q", *values)


def d(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


def w(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}H", *values)


def _address(bits: int, number: int) -> int:
    return 0x1040 + 0x800 * number if bits == 16 else 0x20_0340 + 0x1_0000 * number


BX, SP, SI, DI = (_address(64, n) for n in (3, 4, 6, 7))
BX16, SP16, SI16, DI16 = (_address(16, n) for n in (3, 4, 6, 7))
HLT64, HLT16 = TARGETS[64], TARGETS[16]
FS, GS = 0x50_0000, 0x48_0000
EDGE = 0x23_0FFD  # three bytes before the end of a page
EDGE16 = 0x2FFD


def gate(target: int, selector: int, ist: int = 0, dpl: int = 3) -> bytes:
    """A 64-bit interrupt gate."""
    attributes = 0x8E | dpl << 5
    low, middle, high = target & 0xFFFF, target >> 16 & 0xFFFF, target >> 32
    return struct.pack("<HHBBHII", low, selector, ist, attributes, middle, high, 0)


FORMS: list[Form] = []


def _add(group: str, bits: int, *rows: tuple[object, ...], **common: object) -> None:
    """Rows of (name, hex, registers, memory, further fields), the last three optional."""
    for row in rows:
        name, code, registers, memory, more = (*row, {}, {}, {})[:5] if len(row) < 5 else row
        fields = {**common, **more}  # type: ignore[dict-item]
        data = bytes.fromhex(str(code))
        FORMS.append(Form(group, name, bits, data, registers, memory, **fields))  # type: ignore[arg-type]


_add(
    "operands",
    64,
    ("cmp dword ptr [r14 + 0x28], imm32", "41 81 7e 28 5f 46 56 48"),
    ("mov al, [rbx]", "8a 03"),
    ("mov ax, [rbx]", "66 8b 03"),
    ("mov rax, [rbx]", "48 8b 03"),
    ("mov [rbx], rax", "48 89 03"),
    ("mov byte ptr [rbx], 7", "c6 03 07"),
    ("mov rax, [rip + 0x12000]", "48 8b 05 00 20 01 00"),
    ("mov rax, [eip + 0x12000]", "67 48 8b 05 00 20 01 00"),
    ("mov rax, [rbx + rcx * 4]", "48 8b 04 8b", {"rcx": 0x4000}),
    ("mov rax, [rbx + r12 * 8 - 8]", "4a 8b 44 e3 f8", {"r12": (1 << 64) - 0x4000}),
    ("mov eax, [ebx]", "67 8b 03", {"rbx": 0xFFFF_0000_0023_0340}),
    ("mov eax, [ebx + ecx * 4], wrapping", "67 8b 04 8b", {"rcx": 0xFFFF_F000}),
    ("mov rax, [0x200000]", "48 8b 04 25 00 00 20 00"),
    ("mov rax, moffs", "48 a1 40 03 21 00 00 00 00 00"),
    ("mov moffs, al", "a2 40 03 22 00 00 00 00 00"),
    ("movzx eax, byte ptr [rbx]", "0f b6 03"),
    ("movsxd rax, dword ptr [rbx]", "48 63 03"),
    ("movbe eax, [rbx]", "0f 38 f0 03"),
    ("movbe [rbx], eax", "0f 38 f1 03"),
    ("movnti [rbx], rax", "48 0f c3 03"),
    ("cmove rcx, [rbx]", "48 0f 44 0b"),
    ("imul rax, [rbx]", "48 0f af 03"),
    ("mul qword ptr [rbx]", "48 f7 23"),
    ("div dword ptr [rbx]", "f7 33", {"rdx": 0}, {BX: d(7)}),
    ("bsf rax, [rbx]", "48 0f bc 03"),
    ("popcnt rax, [rbx]", "f3 48 0f b8 03"),
    ("crc32 rax, qword ptr [rbx]", "f2 48 0f 38 f1 03"),
    ("xlat", "d7", {"rax": 0x1234_5680}),
    ("sete [rbx]", "0f 94 03"),
    ("test byte ptr [rbx], 1", "f6 03 01"),
    ("clflush [rbx]", "0f ae 3b"),
    ("prefetchnta [rbx]", "0f 18 03"),
    ("lea rax, [rbx + 8]", "48 8d 43 08"),
    ("nop dword ptr [rbx + 8]", "0f 1f 43 08"),
)
_add(
    "operands",
    16,
    ("mov ax, [bx]", "8b 07"),
    ("mov ax, [bx + si]", "8b 00", {"rbx": 0x1800, "rsi": 0x900}),
    ("mov ax, [bp + si - 2]", "8b 42 fe", {"rbp": 0x1800, "rsi": 0x900}),
    ("mov ax, [bx] with a DS base", "8b 07", {"ds": 0x100}),
    ("mov es:[bx], al", "26 88 07", {"es": 0x200}),
    ("mov ax, ss:[bx]", "36 8b 07", {"ss": 0x80}),
    ("mov eax, [ebx + ecx * 8]", "67 66 8b 04 cb", {"rcx": 3}),
    ("mov ax, [bx + si - 0x1000], wrapping", "8b 80 00 f0", {"rbx": 0x1800, "rsi": 0x0900}),
    ("mov ax, moffs", "a1 34 12"),
    ("add word ptr [bx], 1", "83 07 01"),
    ("xchg [bx], cx", "87 0f"),
    ("bts [bx], ax", "0f ab 07", {"rax": 0xFFF0}),
    ("xlat", "d7", {"rbx": 0xFFF0, "rax": 0x55}),
    ("mov [bx], eax over a page's end", "66 89 07", {"rbx": EDGE16}),
)
_add(
    "segment bases",
    64,
    ("mov rax, gs:[0x28]", "65 48 8b 04 25 28 00 00 00", {"gs_base": GS}),
    ("mov fs:[rbx + 8], rax", "64 48 89 43 08", {"fs_base": FS, "rbx": 0x1000}),
    ("mov eax, fs:[ebx - 8]", "64 67 8b 43 f8", {"fs_base": FS, "rbx": 0x1000}),
    ("add gs:[rbx], rax", "65 48 01 03", {"gs_base": GS, "rbx": 0x2000}),
    ("movsb from fs", "64 a4", {"fs_base": FS, "rsi": 0x3000}),
)
_add(
    "read-modify-write",
    64,
    ("add dword ptr [rbx], 1", "83 03 01"),
    ("lock add dword ptr [rbx], 1", "f0 83 03 01"),
    ("not qword ptr [rbx]", "48 f7 13"),
    ("neg byte ptr [rbx]", "f6 1b"),
    ("inc word ptr [rbx]", "66 ff 03"),
    ("shl qword ptr [rbx], 1", "48 d1 23"),
    ("rol qword ptr [rbx], 5", "48 c1 03 05"),
    ("shld [rbx], rcx, 5", "48 0f a4 0b 05"),
    ("xchg [rbx], rcx", "48 87 0b"),
    ("xadd [rbx], ecx", "0f c1 0b"),
    ("lock xadd [rbx], rcx", "f0 48 0f c1 0b"),
    ("cmpxchg [rbx], ecx, equal", "0f b1 0b", {"rax": 0}),
    ("cmpxchg [rbx], rcx, unequal", "48 0f b1 0b", {"rax": 5}),
    ("lock cmpxchg [rbx], ecx", "f0 0f b1 0b", {"rax": 5}),
    ("cmpxchg8b [rsi]", "0f c7 0e"),
    ("lock cmpxchg8b [rsi]", "f0 0f c7 0e", {"rax": 0, "rdx": 0}),
    ("cmpxchg16b [rsi]", "48 0f c7 0e"),
)
_add(
    "bit strings",
    64,
    ("bt [rbx], rcx", "48 0f a3 0b", {"rcx": 0x8_0000}),
    ("bts [rbx], rcx, negative", "48 0f ab 0b", {"rcx": (1 << 64) - 0x8_0000}),
    ("btr [rbx], ecx", "0f b3 0b", {"rcx": 0xFFFF_0000}),
    ("btc [rbx], cx", "66 0f bb 0b", {"rcx": 0x8000}),
    ("bt dword ptr [rbx], 31", "0f ba 23 1f"),
    ("lock bts qword ptr [rbx], 63", "f0 48 0f ba 2b 3f"),
)
_add(
    "stack",
    64,
    ("push rax", "50"),
    ("push ax", "66 50"),
    ("push imm32", "68 01 00 00 00"),
    ("push qword ptr [rbx]", "ff 33"),
    ("push qword ptr [rsp + 0x1000]", "ff b4 24 00 10 00 00"),
    ("push gs", "0f a8"),
    ("pop rax", "58"),
    ("pop qword ptr [rbx]", "8f 03"),
    ("pop qword ptr [rsp + 0x1000]", "8f 84 24 00 10 00 00"),
    ("pop rsp", "5c"),
    ("pushfq", "9c"),
    ("popfq", "9d", {}, {SP: q(2)}),
    ("call rel32", "e8 fb 00 00 00"),
    ("call [rbx]", "ff 13", {}, {BX: q(HLT64)}),
    ("call [rsp + 8]", "ff 54 24 08"),
    ("jmp [rbx]", "ff 23", {}, {BX: q(HLT64)}),
    ("ret", "c3"),
    ("ret 16", "c2 10 00"),
    ("enter 0x20, 0", "c8 20 00 00"),
    ("enter 0x20, 3", "c8 20 00 03"),
    ("leave", "c9"),
    ("push over a page's end", "50", {"rsp": 0x24_1004}),
    ("pop over a page's end", "58", {"rsp": 0x24_0FFC}),
)
_add(
    "stack",
    16,
    ("push ax with an SS base", "50", {"ss": 0x100}),
    ("push eax", "66 50"),
    ("push imm16", "68 34 12"),
    ("pop word ptr [bx]", "8f 07"),
    ("pop es", "07"),
    ("pusha", "60"),
    ("popa", "61"),
    ("pushf", "9c"),
    ("call rel16", "e8 fd 00"),
    ("ret", "c3"),
    ("call far imm", "9a 00 81 00 00"),
    ("call far [bx]", "ff 1f", {}, {BX16: w(HLT16, 0)}),
    ("jmp far [bx]", "ff 2f", {}, {BX16: w(HLT16, 0)}),
    ("ret far", "cb", {}, {SP16: w(HLT16, 0)}),
    ("iret", "cf", {}, {SP16: w(HLT16, 0, 2)}),
    ("enter 0x10, 2", "c8 10 00 02"),
    ("leave", "c9", {"rbp": 0x5FF0}),
    ("lds cx, [bx]", "c5 0f"),
    ("int3", "cc", {}, {}, {"idt": True}),
    ("int 0x21", "cd 21", {}, {}, {"idt": True}),
)
_add(
    "strings",
    64,
    ("movsb", "a4"),
    ("movsq", "48 a5"),
    ("movsq, backwards", "48 a5", {"rflags": 2 | DF}),
    ("movsq over a page's end", "48 a5", {"rsi": SI + 0xCBC, "rdi": DI}),
    ("rep movsb", "f3 a4", {"rcx": 5}),
    ("rep movsq, backwards", "f3 48 a5", {"rcx": 5, "rflags": 2 | DF}),
    ("rep movsd, 32-bit addresses", "67 f3 a5", {"rcx": 0xF_0000_0003}),
    ("rep movsb, no element", "f3 a4", {"rcx": 0}),
    ("rep movsb into a second page", "f3 a4", {"rcx": 0x1000}),
    ("rep stosb", "f3 aa", {"rcx": 9}),
    ("rep stosq over three pages", "f3 48 ab", {"rcx": 0x300}),
    ("stosd", "ab"),
    ("lodsq", "48 ad"),
    ("rep lodsb", "f3 ac", {"rcx": 3}),
    ("scasb", "ae"),
    ("repe scasd", "f3 af", {"rcx": 4, "rax": 0}),
    ("repne scasb", "f2 ae", {"rcx": 4, "rax": 9}),
    ("cmpsb", "a6"),
    ("repe cmpsd", "f3 a7", {"rcx": 4}),
    ("insb", "6c", {"rdx": 0x80}, {}, {"rings": (0,)}),
    ("outsb", "6e", {"rdx": 0x80}, {}, {"rings": (0,)}),
)
_add(
    "strings",
    16,
    ("movsb, two segments", "a4", {"ds": 0x100, "es": 0x200}),
    ("rep movsw", "f3 a5", {"rcx": 0x1_0003, "es": 0x200}),
    ("rep stosb, 32-bit addresses", "67 f3 aa", {"rcx": 4, "rdi": 0x9100}),
    ("rep movsb into a second page", "f3 a4", {"rcx": 0x1000, "rsi": 0x2000, "rdi": 0x4800}),
    ("scasw", "af"),
    ("cmpsw", "a7"),
    ("lodsd", "66 ad"),
    ("outsb", "6e", {"rdx": 0x80}),
)
_add(
    "x87, SSE and state areas",
    64,
    ("fld dword ptr [rbx]", "d9 03"),
    ("fld tbyte ptr [rbx]", "db 2b"),
    ("fstp tbyte ptr [rbx]", "db 3b"),
    ("fild qword ptr [rbx]", "df 2b"),
    ("fnstcw [rbx]", "d9 3b"),
    ("fldcw [rbx]", "d9 2b", {}, {BX: w(0x37F)}),
    ("fnstenv [rbx]", "d9 33"),
    ("fnsave [rbx]", "dd 33"),
    ("fnsave over a page's end", "dd 33", {"rbx": 0x23_0FC0}),
    ("frstor [rbx]", "dd 23"),
    ("movaps xmm0, [rbx]", "0f 28 03"),
    ("movups [rbx + 7], xmm0", "0f 11 43 07"),
    ("movss xmm0, [rbx]", "f3 0f 10 03"),
    ("movlps [rbx], xmm0", "0f 13 03"),
    ("movups xmm0, [rbx] over a page's end", "0f 10 03", {"rbx": 0x23_0FF8}),
    ("paddd xmm0, [rbx]", "66 0f fe 03"),
    ("cvtsi2sd xmm0, qword ptr [rbx]", "f2 48 0f 2a 03"),
    ("ldmxcsr [rbx]", "0f ae 13", {}, {BX: d(0x1F80)}),
    ("stmxcsr [rbx]", "0f ae 1b"),
    ("fxsave [rbx]", "0f ae 03"),
    ("fxsave over a page's end", "0f ae 03", {"rbx": 0x23_0F00}),
    ("fxrstor [rbx]", "0f ae 0b", {}, {BX: bytes(24) + d(0x1F80)}),
    ("maskmovdqu, all bytes", "66 0f f7 c1", {}, {}, {"before": bytes.fromhex("660f76c9")}),
    ("maskmovdqu, no byte", "66 0f f7 c1", {}, {}, {"before": bytes.fromhex("660fefc9")}),
)
_add(
    "x87, SSE and state areas",
    16,
    ("fnsave [bx]", "dd 37"),
    ("movups xmm0, [bx]", "0f 10 07"),
    ("fld qword ptr [bx]", "dd 07"),
)
_add(
    "system tables",
    64,
    ("sgdt [rbx]", "0f 01 03"),
    ("sidt [rbx]", "0f 01 0b"),
    ("lgdt [rbx]", "0f 01 13", {}, {BX: w(0xFF) + q(GDT)}, {"rings": (0,)}),
    ("lidt [rbx]", "0f 01 1b", {}, {}, {"rings": (0,)}),
    ("smsw [rbx]", "0f 01 23"),
    ("sldt [rbx]", "0f 00 03"),
    ("str [rbx]", "0f 00 0b"),
    ("mov ds, ax", "8e d8", {"rax": 0x23}),
    ("mov ds, ax, not accessed yet", "8e d8", {"rax": 0x53}),
    ("mov ds, [rbx]", "8e 1b", {}, {BX: w(0x23)}),
    ("mov ds, ax, null", "8e d8", {"rax": 0}),
    ("pop gs", "0f a9", {}, {SP: q(0x23)}),
    ("lldt ax", "0f 00 d0", {"rax": 0x40}, {}, {"rings": (0,)}),
    ("ltr ax", "0f 00 d8", {"rax": 0x60}, {}, {"rings": (0,)}),
    ("verr ax", "0f 00 e0", {"rax": 0x23}),
    ("lar ecx, ax", "0f 02 c8", {"rax": 0x23}),
    ("lsl ecx, ax", "0f 03 c8", {"rax": 0x23}),
    ("lss ecx, [rbx]", "0f b2 0b", {"rsp": SP}, {BX: d(0x1234) + w(0x23)}, {"rings": (3,)}),
)
_add(
    "system tables",
    16,
    ("lgdt [bx]", "0f 01 17"),
    ("sidt [bx]", "0f 01 0f"),
    ("smsw [bx]", "0f 01 27"),
)
_add(
    "far transfers and events",
    64,
    ("call far [rbx]", "48 ff 1b", {}, {BX: q(HLT64) + w(0x08)}, {"rings": (0,)}),
    ("call far [rbx], ring 3", "48 ff 1b", {}, {BX: q(HLT64) + w(0x2B)}, {"rings": (3,)}),
    ("jmp far [rbx]", "ff 2b", {}, {BX: d(HLT64) + w(0x08)}, {"rings": (0,)}),
    ("ret far", "48 cb", {}, {SP: q(HLT64, 0x08)}, {"rings": (0,)}),
    ("ret far to ring 3", "48 cb", {}, {SP: q(HLT64, 0x2B, SP, 0x23)}, {"rings": (0,)}),
    ("iretq", "48 cf", {}, {SP: q(HLT64, 0x08, 2, SP, 0x10)}, {"rings": (0,)}),
    ("iretq to ring 3", "48 cf", {}, {SP: q(HLT64, 0x2B, 2, SP, 0x23)}, {"rings": (0,)}),
    ("int 0x21", "cd 21", {}, {}, {"idt": True}),
    ("int3", "cc", {}, {}, {"idt": True}),
    ("int 0x22, on an interrupt stack", "cd 22", {}, {}, {"idt": True}),
    ("ud2", "0f 0b", {}, {}, {"idt": True}),
    ("div by zero, from memory", "f7 33", {"rdx": 0}, {}, {"idt": True}),
    ("mov rax, [rbx], not mapped (#PF)", "48 8b 03", {"rbx": 0x4000_0000}, {}, {"idt": True}),
    ("mov rax, [rbx], not canonical (#GP)", "48 8b 03", {"rbx": 1 << 62}, {}, {"idt": True}),
    ("lgdt [rbx] (#GP)", "0f 01 13", {}, {}, {"idt": True, "rings": (3,)}),
)
_add(
    "page crossings",
    64,
    ("mov rax, [rbx]", "48 8b 03", {"rbx": EDGE}),
    ("mov [rbx], eax", "89 03", {"rbx": 0x23_0FFF}),
    ("add [rbx], rax", "48 01 03", {"rbx": EDGE}),
    ("lock xadd [rbx], rcx", "f0 48 0f c1 0b", {"rbx": 0x23_0FFC}),
    ("mov rax, [rbx], over two tables", "48 8b 03", {"rbx": 0x3F_FFFD}),
    ("push qword ptr [rbx]", "ff 33", {"rbx": EDGE}),
    ("code over a page's end", "48 8b 83 00 01 00 00", {}, {}, {"at": 0x10_1FFD}),
    ("code over a page's end, with data there", "48 8b 05 00 00 00 00", {}, {}, {"at": 0x10_1FFC}),
    ("code that ends a page", "48 8b 03", {}, {}, {"at": 0x10_1FFD}),
    ("code over two tables", "48 c7 03 01 00 00 00", {}, {}, {"at": 0x1F_FFFC}),
)
_add(
    "page crossings",
    16,
    ("mov eax, [bx]", "66 8b 07", {"rbx": EDGE16}),
    ("push eax", "66 50", {"rsp": 0x3002}),
    ("code over a page's end", "81 07 34 12", {}, {}, {"at": 0x8FFE}),
)

# A page of dwords at 0x41_0000 serves as indices and masks.
_INDICES = 0x41_0000
_LOAD_YMM1 = bytes.fromhex("c5fe6f0c25") + d(_INDICES)  # vmovdqu ymm1, [indices]
_ONES_YMM2 = bytes.fromhex("c5ed76d2")  # vpcmpeqd ymm2, ymm2, ymm2
_LOAD_YMM2 = bytes.fromhex("c5fe6f1425") + d(_INDICES + 32)  # vmovdqu ymm2, [masks]
_GATHER = {_INDICES: d(*range(0, 0x2000, 0x400))}
_MASK = {_INDICES + 32: d(0, 0, 1 << 31, 1 << 31, 0, 0, 0, 0)}
_add(
    "AVX and AVX2",
    64,
    ("vmovups ymm0, [rbx]", "c5 fc 10 03"),
    ("vmovups [rbx], ymm0 over a page's end", "c5 fc 11 03", {"rbx": 0x23_0FF0}),
    ("vaddps ymm0, ymm0, [rbx]", "c5 fc 58 03"),
    ("vbroadcastss ymm0, [rbx]", "c4 e2 7d 18 03"),
    ("vmovntdq [rbx], ymm0", "c5 fd e7 03"),
    (
        "vpgatherdd ymm0, [rbx + ymm1 * 4], ymm2",
        "c4 e2 6d 90 04 8b",
        {},
        _GATHER,
        {"before": _LOAD_YMM1 + _ONES_YMM2},
    ),
    (
        "vpgatherdd, two lanes chosen",
        "c4 e2 6d 90 04 8b",
        {},
        {**_GATHER, **_MASK},
        {"before": _LOAD_YMM1 + _LOAD_YMM2},
    ),
    ("vmaskmovps ymm0, ymm2, [rbx]", "c4 e2 6d 2c 03", {}, _MASK, {"before": _LOAD_YMM2}),
    (
        "vmaskmovps [rbx], ymm2, ymm0 over a page's end",
        "c4 e2 6d 2e 03",
        {"rbx": 0x23_0FF0},
        _MASK,
        {"before": _LOAD_YMM2},
    ),
    needs="avx2",
)
_add(
    "AVX-512",
    64,
    ("vmovdqu32 zmm0, [rbx]", "62 f1 7e 48 6f 03"),
    ("vmovdqu32 [rbx], zmm0 over a page's end", "62 f1 7e 48 7f 03", {"rbx": 0x23_0FF0}),
    needs="avx512f",
)

GROUPS = tuple(dict.fromkeys(form.group for form in FORMS))
