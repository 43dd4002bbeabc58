"""The model-specific registers that the software KVM has; any other is #GP, as in the kernel."""

from __future__ import annotations

import time

from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.x86.registers import EFER_LMA, EFER_LME, EFER_NXE, EFER_SCE

__all__ = ["read_msr", "write_msr"]

MSR_TSC = 0x10
MSR_APIC_BASE = 0x1B
MSR_EFER = 0xC0000080
MSR_FS_BASE, MSR_GS_BASE = 0xC0000100, 0xC0000101
_LOADED = {  # by VMLOAD, from the VMCB
    0x174: "sysenter_cs",
    0x175: "sysenter_esp",
    0x176: "sysenter_eip",
    0xC0000081: "star",
    0xC0000082: "lstar",
    0xC0000083: "cstar",
    0xC0000084: "sfmask",
    0xC0000102: "kernel_gs_base",
}
_EFER_WRITABLE = EFER_SCE | EFER_LME | EFER_NXE


def read_msr(vcpu: KvmVcpu, index: int) -> int | None:
    """The register's value, or ``None`` if there is no such register."""
    if index in _LOADED:
        return vcpu.cpu.msrs[_LOADED[index]]
    match index:
        case 0xC0000080:
            return int(vcpu.sregs.efer)
        case 0xC0000100:
            return vcpu.cpu.segment_base("fs")
        case 0xC0000101:
            return vcpu.cpu.segment_base("gs")
        case 0x10:
            return time.monotonic_ns()
        case 0x1B:
            return int(vcpu.sregs.apic_base)
    return None


def write_msr(vcpu: KvmVcpu, index: int, value: int) -> bool:
    """Write it; ``False`` if there is no such register or the value is not one it takes."""
    sregs = vcpu.sync_sregs()
    if index in _LOADED:
        vcpu.cpu.msrs[_LOADED[index]] = value
    elif index == MSR_EFER:
        if value & ~(_EFER_WRITABLE | EFER_LMA):
            return False
        sregs.efer = value & _EFER_WRITABLE | sregs.efer & EFER_LMA
    elif index == MSR_FS_BASE:
        sregs.fs.base = value
    elif index == MSR_GS_BASE:
        sregs.gs.base = value
    elif index == MSR_APIC_BASE:
        sregs.apic_base = value
    elif index != MSR_TSC:
        return False
    vcpu.load_sregs()
    return True
