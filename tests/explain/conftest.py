"""Writers of register dumps in QEMU's format, from values, handed out as a fixture."""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace

import pytest

GPRS = ("RAX RBX RCX RDX", "RSI RDI RBP RSP", "R8 R9 R10 R11", "R12 R13 R14 R15")


def qemu_code(code: str, rip_offset: int = 0) -> str:
    """``Code=``, with the byte at ``rip_offset`` marked."""
    words = code.split()
    words[rip_offset] = f"<{words[rip_offset]}>"
    return "Code=" + " ".join(words)


def qemu64(
    code: str | None,
    registers: Mapping[str, int] | None = None,
    *,
    rip_offset: int = 0,
    error: str | None = "error: kvm run failed Bad address",
) -> str:
    """A dump of 64-bit code at CPL 0, or at the CPL that ``registers`` say."""
    values = {"RIP": 0x10_0000, "CPL": 0, "CR0": 0x8005_0033, "CR3": 0x1000, "CR4": 0x20}
    values.update({"RFL": 0x46, "EFER": 0xD00, "CR2": 0, "FS": 0, "GS": 0, "HLT": 0})
    values.update(registers or {})
    lines = [error] if error else []
    for row in GPRS:
        lines.append(" ".join(f"{name:3}={values.get(name, 0):016x}" for name in row.split()))
    cpl = values["CPL"]
    lines.append(
        f"RIP={values['RIP']:016x} RFL={values['RFL']:08x} [---Z-P-] CPL={cpl} II=0 A20=1 SMM=0 "
        f"HLT={values['HLT']}"
    )
    dpl = cpl << 13
    for name, selector, limit, flags, kind in (
        ("ES", 0, 0, 0, ""),
        ("CS", 0x10 | cpl, 0xFFFFFFFF, 0xA09B00 | dpl, f"DPL={cpl} CS64 [-RA]"),
        ("SS", 0x18 | cpl, 0xFFFFFFFF, 0xC09300 | dpl, f"DPL={cpl} DS   [-WA]"),
        ("DS", 0, 0, 0, ""),
        ("FS", 0, 0, 0, ""),
        ("GS", 0, 0, 0, ""),
        ("LDT", 0, 0xFFFF, 0x8200, "DPL=0 LDT"),
        ("TR", 0x40, 0x2087, 0x8B00, "DPL=0 TSS64-busy"),
    ):
        base = values.get(name, 0x7000 if name == "TR" else 0)
        lines.append(f"{name:3}={selector:04x} {base:016x} {limit:08x} {flags:08x} {kind}".rstrip())
    lines += [
        "GDT=     0000000000006000 0000007f",
        "IDT=     0000000000005000 00000fff",
        f"CR0={values['CR0']:08x} CR2={values['CR2']:016x} CR3={values['CR3']:016x} "
        f"CR4={values['CR4']:08x}",
        "DR0=0000000000000000 DR1=0000000000000000 DR2=0000000000000000 DR3=0000000000000000 ",
        "DR6=00000000ffff0ff0 DR7=0000000000000400",
        f"EFER={values['EFER']:016x}",
    ]
    if code is not None:
        lines.append(qemu_code(code, rip_offset))
    return "\n".join(lines) + "\n"


def qemu32(code: str, registers: Mapping[str, int], *, real: bool = False) -> str:
    """A dump of 32-bit protected mode, or of real mode."""
    get = registers.get
    flags, limit = (0x9300, 0xFFFF) if real else (0xCF9300, 0xFFFFFFFF)
    code_flags = 0x9B00 if real else 0xCF9B00
    names = ("EAX EBX ECX EDX", "ESI EDI EBP ESP")
    lines = ["error: kvm run failed Bad address"]
    lines += [" ".join(f"{n}={get(n, 0):08x}" for n in row.split()) for row in names]
    lines.append(f"EIP={get('EIP', 0):08x} EFL=00000002 [-------] CPL=0 II=0 A20=1 SMM=0 HLT=0")
    for name in ("ES", "CS", "SS", "DS", "FS", "GS"):
        base = get(name, 0)
        selector = base >> 4 if real else 0x10
        shown = code_flags if name == "CS" else flags
        lines.append(f"{name} ={selector:04x} {base:08x} {limit:08x} {shown:08x}")
    lines += [
        "LDT=0000 00000000 0000ffff 00008200",
        "TR =0000 00000000 0000ffff 00008b00",
        "GDT=     00000000 0000ffff",
        "IDT=     00000000 000003ff",
        f"CR0={get('CR0', 0x10 if real else 0x11):08x} CR2=00000000 CR3=00000000 CR4=00000000",
        "DR6=ffff0ff0 DR7=00000400",
        "EFER=0000000000000000",
        qemu_code(code),
    ]
    return "\n".join(lines) + "\n"


AARCH64 = """error: kvm run failed Bad address
 PC=ffff800010123456 X00=ffff000004a81000 X01=0000000000000040
X02=0000000000000000 X03=ffff80001172d000 X30=ffff800010123400  SP=ffff80001172bf00
PSTATE=604003c5 -ZC- EL1h
"""


@pytest.fixture(scope="session")
def dumps() -> SimpleNamespace:
    """``dumps.qemu64(code, registers)``, ``dumps.qemu32(...)``, ``dumps.aarch64``."""
    return SimpleNamespace(qemu64=qemu64, qemu32=qemu32, aarch64=AARCH64)
