"""What of a vCPU's registers decides which memory an instruction accesses.

One frozen record, :class:`CpuState`, serves a live vCPU (``KVM_GET_REGS``, ``KVM_GET_SREGS``) and a
register dump that some other VMM printed.  Registers that a source does not have (vector and mask
registers, XCR0) are absent: what depends on them is then reported as not known, never guessed.

General registers are kept in the order of their encoding, which is neither ``struct kvm_regs``'s
nor the one that dumps use: RAX RCX RDX RBX RSP RBP RSI RDI R8 ... R15.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from guestfault.x86.registers import CR0_PE, EFER_LMA, X86_EFLAGS_VM

if TYPE_CHECKING:
    from guestfault.uapi import kvm as uapi

__all__ = ["GPR_NAMES", "CpuState", "Segment", "Table"]

GPR_NAMES = (
    *("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi"),
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A segment register with its hidden part, as the CPU caches it.

    ``limit`` is in bytes (granularity applied); ``type`` is the descriptor's four type bits;
    ``long`` and ``big`` are its L and D/B flags.
    """

    selector: int = 0
    base: int = 0
    limit: int = 0xFFFF
    type: int = 3
    dpl: int = 0
    present: bool = True
    code_or_data: bool = True
    long: bool = False
    big: bool = False

    @classmethod
    def from_kvm(cls, segment: uapi.kvm_segment) -> Segment:
        """From ``struct kvm_segment``."""
        return cls(
            selector=segment.selector,
            base=segment.base,
            limit=segment.limit,
            type=segment.type,
            dpl=segment.dpl,
            present=bool(segment.present) and not segment.unusable,
            code_or_data=bool(segment.s),
            long=bool(segment.l),
            big=bool(segment.db),
        )

    @classmethod
    def from_flags(cls, selector: int, base: int, limit: int, flags: int) -> Segment:
        """From the second dword of a descriptor: what QEMU prints after the limit."""
        return cls(
            selector=selector,
            base=base,
            limit=limit,
            type=flags >> 8 & 15,
            dpl=flags >> 13 & 3,
            present=bool(flags >> 15 & 1),
            code_or_data=bool(flags >> 12 & 1),
            long=bool(flags >> 21 & 1),
            big=bool(flags >> 22 & 1),
        )

    def holds(self, offset: int, size: int) -> bool:
        """Whether ``size`` bytes at ``offset`` lie within the limit; expand-down data included."""
        if self.code_or_data and self.type & 0b1100 == 0b0100:
            top = 0xFFFF_FFFF if self.big else 0xFFFF
            return offset > self.limit and offset + size - 1 <= top
        return offset + size - 1 <= self.limit


@dataclass(frozen=True, slots=True)
class Table:
    """GDTR or IDTR: linear base, limit in bytes."""

    base: int = 0
    limit: int = 0xFFFF


@dataclass(frozen=True, slots=True)
class CpuState:
    """The registers of one vCPU at an instruction boundary.

    ``vectors`` maps a vector register's number to its known bytes, least significant first (16, 32
    or 64 of them); ``masks`` maps k0 ... k7 to their value.  Defaults are those of a 64-bit kernel
    with flat segments.
    """

    gprs: tuple[int, ...] = (0,) * 16
    rip: int = 0
    rflags: int = 2
    es: Segment = Segment()
    cs: Segment = Segment(type=11, long=True, limit=0xFFFF_FFFF)
    ss: Segment = Segment(big=True, limit=0xFFFF_FFFF)
    ds: Segment = Segment()
    fs: Segment = Segment()
    gs: Segment = Segment()
    tr: Segment = Segment(type=11, code_or_data=False)
    ldt: Segment = Segment(type=2, code_or_data=False)
    gdt: Table = Table()
    idt: Table = Table()
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
        return cls(
            gprs=tuple(getattr(regs, name) for name in GPR_NAMES),
            rip=regs.rip,
            rflags=regs.rflags,
            es=Segment.from_kvm(sregs.es),
            cs=Segment.from_kvm(sregs.cs),
            ss=Segment.from_kvm(sregs.ss),
            ds=Segment.from_kvm(sregs.ds),
            fs=Segment.from_kvm(sregs.fs),
            gs=Segment.from_kvm(sregs.gs),
            tr=Segment.from_kvm(sregs.tr),
            ldt=Segment.from_kvm(sregs.ldt),
            gdt=Table(sregs.gdt.base, sregs.gdt.limit),
            idt=Table(sregs.idt.base, sregs.idt.limit),
            cr0=sregs.cr0,
            cr3=sregs.cr3,
            cr4=sregs.cr4,
            efer=sregs.efer,
        )

    @property
    def protected(self) -> bool:
        """CR0.PE is set; virtual-8086 mode counts as protected."""
        return bool(self.cr0 & CR0_PE)

    @property
    def virtual8086(self) -> bool:
        """EFLAGS.VM is set in protected mode outside long mode."""
        return self.protected and not self.long_mode and bool(self.rflags & X86_EFLAGS_VM)

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
        if self.long_mode and self.cs.long:
            return 64
        return 32 if self.cs.big and not self.virtual8086 else 16

    @property
    def cpl(self) -> int:
        """Current privilege level, 0 in real mode."""
        if self.virtual8086:
            return 3
        return self.ss.dpl if self.protected else 0

    @property
    def iopl(self) -> int:
        """EFLAGS.IOPL."""
        return self.rflags >> 12 & 3
