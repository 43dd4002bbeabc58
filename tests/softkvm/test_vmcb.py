"""What goes into a VMCB, where the architecture's manual has it (APM volume 2, appendix B)."""

from __future__ import annotations

import struct

import pytest

from guestfault.softkvm.vmcb import VMCB_SIZE, SvmExit, fill_vmcb, segment_attributes
from guestfault.uapi import kvm as uapi
from guestfault.x86.segments import Segments

MSRS = dict.fromkeys(
    [
        "star",
        "lstar",
        "cstar",
        "sfmask",
        "kernel_gs_base",
        "sysenter_cs",
        "sysenter_esp",
        "sysenter_eip",
    ],
    0,
)


def sregs_of(segments: Segments) -> uapi.kvm_sregs:
    sregs = uapi.kvm_sregs(cr0=0x80000011, cr3=0x1000, cr4=0x20, efer=0xD00, cr2=0x1234)
    for name, segment in vars(segments).items():
        setattr(sregs, name, uapi.kvm_segment(**vars(segment)))
    return sregs


@pytest.mark.parametrize("cpl", [0, 3])
def test_the_state_lies_where_vmrun_looks_for_it(cpl: int) -> None:
    page = memoryview(bytearray(VMCB_SIZE))
    sregs = sregs_of(Segments.long_mode(cpl))
    fill_vmcb(page, sregs, rip=0x8000, rsp=0xF000, rax=7, rflags=0x3000, msrs=MSRS, bitmaps=1 << 47)

    def at(offset: int, form: str = "Q") -> int:
        return struct.unpack_from("<" + form, page, offset)[0]

    assert at(0x4CB, "B") == cpl
    assert at(0x578) == 0x8000
    assert (at(0x5D8), at(0x5F8), at(0x570)) == (0xF000, 7, 0x3002)  # bit 1 is always set
    assert (at(0x558), at(0x550), at(0x548), at(0x640)) == (0x80000011, 0x1000, 0x20, 0x1234)
    assert at(0x4D0) == 0xD00 | 1 << 12  # VMRUN wants EFER.SVME
    assert at(0x410, "H") == sregs.cs.selector
    assert at(0x412, "H") == segment_attributes(sregs.cs)
    intercepted = at(0x00C, "I")
    for code in (SvmExit.HLT, SvmExit.MSR, SvmExit.SWINT, SvmExit.INVLPG):
        assert intercepted >> (code - 0x60) & 1


def test_an_unusable_segment_is_not_present() -> None:
    segment = uapi.kvm_segment(type=3, s=1, present=1, unusable=1)
    assert segment_attributes(segment) == 0
