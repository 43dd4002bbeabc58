"""The virtual machine control block: how a guest's state gets into the software processor.

The Unicorn engine emulates AMD's SVM.  Its own register interface cannot set a segment's base,
limit or rights, nor the privilege level; the VMRUN instruction can, from a VMCB.  So the software
KVM does what kvm_amd does: it fills a VMCB, runs VMLOAD and VMRUN, and is told of the intercepted
instructions as #VMEXIT codes.  (AMD64 Architecture Programmer's Manual, volume 2, appendix B, C.)
"""

from __future__ import annotations

import enum
import struct

from guestfault.uapi import kvm as uapi

__all__ = [
    "INTERCEPT_EXCEPTION",
    "VMCB_SIZE",
    "VMEXIT_INVALID",
    "VMEXIT_NPF",
    "SvmExit",
    "fill_vmcb",
    "segment_attributes",
]

VMCB_SIZE = 4096


class SvmExit(enum.IntEnum):
    """#VMEXIT codes of the intercepts that :func:`fill_vmcb` sets."""

    WRITE_CR0 = 0x10
    WRITE_CR3 = 0x13
    WRITE_CR4 = 0x14
    WRITE_CR8 = 0x18
    EXCEPTION = 0x40  # plus the vector
    SWINT = 0x75
    HLT = 0x78
    INVLPG = 0x79
    MSR = 0x7C
    SHUTDOWN = 0x7F
    VMRUN = 0x80
    VMMCALL = 0x81


INTERCEPT_EXCEPTION = SvmExit.EXCEPTION
# Not intercepts: the one comes of a second stage, which here is ours and not the engine's; the
# other stands for what no processor stops for.
VMEXIT_NPF, VMEXIT_INVALID = 0x400, 0xFFFF_FFFF

_CR_WRITES = (1 << 0) | (1 << 3) | (1 << 4) | (1 << 8)
_INTERCEPTS_1 = (
    (1 << (SvmExit.SWINT - 0x60))
    | (1 << (SvmExit.HLT - 0x60))
    | (1 << (SvmExit.INVLPG - 0x60))
    | (1 << (SvmExit.MSR - 0x60))
)
_INTERCEPTS_2 = 0x7F  # VMRUN, VMMCALL, VMLOAD, VMSAVE, STGI, CLGI, SKINIT: no nesting

_EFER_SVME = 1 << 12

# Offsets of the state save area that have no run of their own below.
_SEGMENTS = ("es", "cs", "ss", "ds", "fs", "gs", None, "ldt", None, "tr")
_GDTR, _IDTR = 0x460, 0x480


def segment_attributes(segment: uapi.kvm_segment) -> int:
    """A segment's rights in the VMCB's 12-bit packing; 0 (not present) for an unusable one."""
    if segment.unusable:
        return 0
    return int(
        segment.type
        | segment.s << 4
        | segment.dpl << 5
        | segment.present << 7
        | segment.avl << 8
        | segment.l << 9
        | segment.db << 10
        | segment.g << 11
    )


def fill_vmcb(
    page: memoryview,
    sregs: uapi.kvm_sregs,
    *,
    rip: int,
    rsp: int,
    rax: int,
    rflags: int,
    msrs: dict[str, int],
    bitmaps: int,
) -> None:
    """Write a VMCB for this state.

    ``page`` is its 4 KiB; ``bitmaps`` the physical address of the all-ones permission bitmaps;
    ``msrs`` the registers VMLOAD loads: star, lstar, cstar, sfmask, kernel_gs_base, sysenter_*.
    """

    def put(offset: int, form: str, *values: int) -> None:
        struct.pack_into("<" + form, page, offset, *values)

    page[:] = bytes(VMCB_SIZE)
    put(0x002, "H", _CR_WRITES)
    put(0x008, "III", 0xFFFFFFFF, _INTERCEPTS_1, _INTERCEPTS_2)
    put(0x040, "QQ", bitmaps, bitmaps)
    put(0x058, "II", 1, 1)  # an ASID other than the host's; flush the TLB

    for i, name in enumerate(_SEGMENTS):
        if name is not None:
            s = getattr(sregs, name)
            put(0x400 + 16 * i, "HHIQ", s.selector, segment_attributes(s), s.limit, s.base)
    put(_GDTR, "HHIQ", 0, 0, sregs.gdt.limit, sregs.gdt.base)
    put(_IDTR, "HHIQ", 0, 0, sregs.idt.limit, sregs.idt.base)
    put(0x4CB, "B", sregs.ss.dpl if sregs.cr0 & 1 else 0)
    put(0x4D0, "Q", sregs.efer | _EFER_SVME)
    put(0x548, "QQQ", sregs.cr4, sregs.cr3, sregs.cr0)
    put(0x560, "QQQQ", 0x400, 0xFFFF0FF0, rflags | 2, rip)
    put(0x5D8, "Q", rsp)
    put(0x5F8, "Q", rax)
    put(0x600, "QQQQ", msrs["star"], msrs["lstar"], msrs["cstar"], msrs["sfmask"])
    put(0x620, "Q", msrs["kernel_gs_base"])
    put(0x628, "QQQ", msrs["sysenter_cs"], msrs["sysenter_esp"], msrs["sysenter_eip"])
    put(0x640, "Q", sregs.cr2)
