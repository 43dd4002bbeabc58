"""The model-specific registers that the software KVM has; any other is #GP, as in the kernel.

They are reached by the guest's RDMSR and WRMSR, and by userspace's ``KVM_GET_MSRS`` and
``KVM_SET_MSRS``, which may do more (``host_initiated``).
"""

from __future__ import annotations

import time

from guestfault.softkvm.async_pf_ready import (
    kvm_pv_async_pf_ack,
    kvm_pv_enable_async_pf,
    kvm_pv_enable_async_pf_int,
)
from guestfault.softkvm.irq import kvm_apic_set_irq
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.lapic import APIC_BASE_ENABLE, APIC_BASE_EXTD, X2APIC_MSRS
from guestfault.uapi import kvm_para
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
_ASYNC_PF = {
    kvm_para.MSR_KVM_ASYNC_PF_EN: kvm_pv_enable_async_pf,
    kvm_para.MSR_KVM_ASYNC_PF_INT: kvm_pv_enable_async_pf_int,
    kvm_para.MSR_KVM_ASYNC_PF_ACK: kvm_pv_async_pf_ack,
}
_APIC_MODE = APIC_BASE_ENABLE | APIC_BASE_EXTD
_EFER_WRITABLE = EFER_SCE | EFER_LME | EFER_NXE


def read_msr(vcpu: KvmVcpu, index: int) -> int | None:
    """The register's value, or ``None`` if there is no such register."""
    if index in _LOADED:
        return vcpu.cpu.msrs[_LOADED[index]]
    if index in X2APIC_MSRS:
        return None if vcpu.apic is None else vcpu.apic.read(index)
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
        case kvm_para.MSR_KVM_ASYNC_PF_EN:
            return vcpu.apf.msr_en_val
        case kvm_para.MSR_KVM_ASYNC_PF_INT:
            return vcpu.apf.msr_int_val
        case kvm_para.MSR_KVM_ASYNC_PF_ACK:
            return 0
    return None


def write_msr(vcpu: KvmVcpu, index: int, value: int, *, host_initiated: bool = False) -> bool:
    """Write it; ``False`` if there is no such register or the value is not one it takes."""
    if index in _ASYNC_PF:
        return _ASYNC_PF[index](vcpu, value)
    if index in X2APIC_MSRS:
        return _write_x2apic(vcpu, index, value)
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
        if not host_initiated and not _mode_can_follow(sregs.apic_base, value):
            return False
        sregs.apic_base = value
    elif index != MSR_TSC:
        return False
    vcpu.load_sregs()
    return True


def _mode_can_follow(old: int, new: int) -> bool:
    """``kvm_set_apic_base``: x2APIC mode is entered from xAPIC mode, and left by switching off."""
    old, new = old & _APIC_MODE, new & _APIC_MODE
    if new == _APIC_MODE:
        return bool(old & APIC_BASE_ENABLE)
    return new != APIC_BASE_EXTD and not (old == _APIC_MODE and new == APIC_BASE_ENABLE)


def _write_x2apic(vcpu: KvmVcpu, index: int, value: int) -> bool:
    apic = vcpu.apic
    if apic is None:
        return False
    vector = apic.self_ipi(index, value)
    if vector is not None:
        kvm_apic_set_irq(vcpu, vector)
        return True
    if not apic.write(index, value):
        return False
    vcpu.sregs.cr8 = apic.cr8
    return True
