"""What of a vCPU's registers decides which memory an instruction accesses.

One frozen record, :class:`CpuState`, serves a live vCPU (``KVM_GET_REGS``, ``KVM_GET_SREGS``) and a
register dump that some other VMM printed.  Registers that a source does not have (vector and mask
registers, XCR0) are absent: what depends on them is then reported as not known, never guessed.

The hidden parts of segment registers are :class:`guestfault.x86.segments.Segment`.

General registers are kept in the order of their encoding, which is neither ``struct kvm_regs``'s
nor the one that dumps use: RAX RCX RDX RBX RSP RBP RSI RDI R8 ... R15.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache

from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import CR0_PE, EFER_LMA, X86_EFLAGS_VM
from guestfault.x86.segments import (
    SYS_TYPE_BUSY_TSS,
    SYS_TYPE_LDT,
    Segment,
    flat_code64,
    flat_data,
)

__all__ = ["GPR_NAMES", "CpuState", "DescriptorTable"]

GPR_NAMES = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)


_CODE, _DATA = flat_code64(), flat_data()
_TASK = Segment(limit=0xFFFF, type=SYS_TYPE_BUSY_TSS, present=1)
_LOCAL_TABLE = Segment(limit=0xFFFF, type=SYS_TYPE_LDT, present=1)


_KVM_REGS = struct.Struct("18Q")
# CR0, CR2, CR3, CR4, CR8 and EFER, in which the part of struct kvm_sregs that changes begins.
_CONTROL = struct.Struct(f"{uapi.kvm_sregs.cr0.offset}x6Q")


@dataclass(frozen=True, slots=True)
class DescriptorTable:
    """GDTR or IDTR: linear base, limit in bytes."""

    base: int = 0
    limit: int = 0xFFFF


_SEGMENTS = ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")
_HIDDEN_SIZE = uapi.kvm_sregs.cr0.offset


@lru_cache(maxsize=64)
def _hidden(data: bytes) -> dict[str, object]:
    """The segments and tables that ``struct kvm_sregs`` begins with: they hardly ever change.

    They come as the fields of a :class:`CpuState`, with those that KVM does not give.
    """
    sregs = uapi.kvm_sregs.from_buffer_copy(data.ljust(ctypes.sizeof(uapi.kvm_sregs), b"\0"))
    fields: dict[str, object] = {name: Segment.from_kvm(getattr(sregs, name)) for name in _SEGMENTS}
    fields["gdt"] = DescriptorTable(sregs.gdt.base, sregs.gdt.limit)
    fields["idt"] = DescriptorTable(sregs.idt.base, sregs.idt.limit)
    return fields | {"xcr0": None, "vectors": {}, "masks": {}}


@dataclass(frozen=True)
class CpuState:
    """The registers of one vCPU at an instruction boundary.

    ``vectors`` maps a vector register's number to its known bytes, least significant first (16, 32
    or 64 of them); ``masks`` maps k0 ... k7 to their value.  Defaults are those of a 64-bit kernel
    with flat segments.
    """

    gprs: tuple[int, ...] = (0,) * 16
    rip: int = 0
    rflags: int = 2
    es: Segment = _DATA
    cs: Segment = _CODE
    ss: Segment = _DATA
    ds: Segment = _DATA
    fs: Segment = _DATA
    gs: Segment = _DATA
    tr: Segment = _TASK
    ldt: Segment = _LOCAL_TABLE
    gdt: DescriptorTable = DescriptorTable()
    idt: DescriptorTable = DescriptorTable()
    cr0: int = 0x8000_0011
    cr3: int = 0
    cr4: int = 0x20
    efer: int = 0x500
    xcr0: int | None = None
    vectors: Mapping[int, bytes] = field(default_factory=dict)
    masks: Mapping[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if len(self.gprs) != 16:
            raise ValueError(f"gprs holds {len(self.gprs)} registers; all 16 are needed")

    @classmethod
    def from_kvm(cls, regs: uapi.kvm_regs, sregs: uapi.kvm_sregs) -> CpuState:
        """From ``struct kvm_regs`` and ``struct kvm_sregs``."""
        rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, *high, rip, rflags = _KVM_REGS.unpack(regs)
        cr0, _, cr3, cr4, _, efer = _CONTROL.unpack_from(sregs)
        # As the constructor would do it, field by field, in a quarter of the time.
        state = object.__new__(cls)
        state.__dict__.update(
            _hidden(bytes(sregs)[:_HIDDEN_SIZE]),
            gprs=(rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, *high),
            rip=rip,
            rflags=rflags,
            cr0=cr0,
            cr3=cr3,
            cr4=cr4,
            efer=efer,
        )
        return state

    @property
    def protected(self) -> bool:
        """CR0.PE is set; virtual-8086 mode counts as protected."""
        return bool(self.cr0 & CR0_PE)

    @property
    def virtual8086(self) -> bool:
        """EFLAGS.VM is set in protected mode outside long mode."""
        return bool(self.rflags & X86_EFLAGS_VM) and self.protected and not self.long_mode

    @property
    def uses_descriptors(self) -> bool:
        """Loading a segment register reads a descriptor table."""
        return self.protected and not self.virtual8086

    @property
    def long_mode(self) -> bool:
        """EFER.LMA is set: 64-bit or compatibility mode."""
        return bool(self.efer & EFER_LMA)

    @property
    def code_size(self) -> int:
        """Bits of the code at CS:RIP: 16, 32 or 64."""
        if self.efer & EFER_LMA and self.cs.l:
            return 64
        return 32 if self.cs.db and not self.virtual8086 else 16

    @property
    def cpl(self) -> int:
        """Current privilege level, 0 in real mode."""
        if not self.cr0 & CR0_PE:
            return 0
        return 3 if self.virtual8086 else self.ss.dpl

    @property
    def iopl(self) -> int:
        """EFLAGS.IOPL."""
        return self.rflags >> 12 & 3
