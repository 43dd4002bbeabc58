"""How an exception gets to the guest: the delivery that a processor does, and Unicorn does not.

Unicorn never delivers an exception through the guest's IDT, it reports it; delivery is ours.  It
reads the IDT, perhaps a descriptor and the TSS, and writes a stack frame: guest memory that may be
absent.  So everything is resolved before anything is written, and what cannot be resolved leaves
the exception pending: the next KVM_RUN tries again.  An exception on the way combines with the
first (:mod:`guestfault.softkvm.exception_queue`).

These are accesses of the processor's, through the second stage, whose failure KVM_RUN reports.  In
real mode that takes a processor which can (``Kvm.unrestricted_guest``); for another one KVM itself
makes them (:mod:`guestfault.softkvm.realmode`).

Delivered are real mode and long mode; 32-bit protected mode is an internal error that says so.
"""

from __future__ import annotations

import struct

from guestfault.softkvm.guest_mmu import read_guest_virt, write_guest_virt
from guestfault.softkvm.internal_error import internal_error
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.realmode import kvm_inject_realmode_interrupt
from guestfault.softkvm.refusal import AccessFailed, Emulate, Exit, GuestException, Refusal
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import (
    CR0_PE,
    GP_VECTOR,
    NP_VECTOR,
    X86_EFLAGS_AC,
    X86_EFLAGS_IF,
    X86_EFLAGS_NT,
    X86_EFLAGS_RF,
    X86_EFLAGS_TF,
    X86_EFLAGS_VM,
)

__all__ = ["deliver"]

_INTERRUPT_GATE, _TRAP_GATE = 14, 15
_IN_IDT = 2  # a bit of a selector error code


def deliver(vcpu: KvmVcpu) -> Refusal | None:
    """Deliver the pending exception.  ``None``: done, or combined with another, still pending."""
    exception = vcpu.pending_exception
    assert exception is not None
    sregs = vcpu.sync_sregs()
    try:
        if not sregs.cr0 & CR0_PE and not vcpu.kvm.unrestricted_guest:
            inc_eip = exception.instruction_length
            kvm_inject_realmode_interrupt(vcpu, exception.vector, inc_eip)
        elif not sregs.cr0 & CR0_PE:
            _deliver_real(vcpu, sregs, exception)
        elif vcpu.long_mode:
            _deliver_long(vcpu, sregs, exception)
        else:
            text = f"exception {exception.vector} in 32-bit protected mode is not delivered here"
            return Exit(internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_DELIVERY_EV, text))
    except AccessFailed as failed:
        if isinstance(failed.refusal, Emulate):
            text = f"exception {exception.vector}: its frame or table is not in memory"
            error = uapi.KVM_INTERNAL_ERROR_DELIVERY_EV
            return Exit(internal_error(vcpu, error, text, failed.refusal))
        return failed.refusal
    vcpu.pending_exception = None
    return None


def _deliver_real(vcpu: KvmVcpu, sregs: uapi.kvm_sregs, exception: GuestException) -> None:
    vector = exception.vector
    if vector * 4 + 3 > sregs.idt.limit:
        raise AccessFailed(GuestException(GP_VECTOR, vector * 8 + _IN_IDT))
    ip, cs = struct.unpack(
        "<HH", read_guest_virt(vcpu, sregs.idt.base + vector * 4, 4, implicit=True)
    )
    regs = vcpu.cpu.named_gprs()
    sp = (regs["rsp"] - 6) & 0xFFFF
    return_ip = (regs["rip"] + exception.instruction_length) & 0xFFFF
    frame = struct.pack("<HHH", return_ip, sregs.cs.selector, regs["rflags"] & 0xFFFF)
    write_guest_virt(vcpu, sregs.ss.base + sp, frame, word=2)
    vcpu.cpu.write_gprs({"rsp": regs["rsp"] & ~0xFFFF | sp, "rip": ip})
    vcpu.cpu.set(
        "rflags", regs["rflags"] & ~(X86_EFLAGS_IF | X86_EFLAGS_TF | X86_EFLAGS_RF | X86_EFLAGS_AC)
    )
    sregs.cs.selector, sregs.cs.base = cs, cs << 4
    vcpu.load_sregs()


def _deliver_long(vcpu: KvmVcpu, sregs: uapi.kvm_sregs, exception: GuestException) -> None:
    vector = exception.vector
    idt_error = vector * 8 + _IN_IDT
    if vector * 16 + 15 > sregs.idt.limit:
        raise AccessFailed(GuestException(GP_VECTOR, idt_error))
    gate = read_guest_virt(vcpu, sregs.idt.base + vector * 16, 16, implicit=True)
    offset_low, selector, ist, kind, offset_mid, offset_high = struct.unpack("<HHBBHI4x", gate)
    if kind & 0x1F not in (_INTERRUPT_GATE, _TRAP_GATE):
        raise AccessFailed(GuestException(GP_VECTOR, idt_error))
    if exception.instruction_length and kind >> 5 & 3 < vcpu.cpl:
        raise AccessFailed(GuestException(GP_VECTOR, vector * 8 + _IN_IDT))
    if not kind & 0x80:
        raise AccessFailed(GuestException(NP_VECTOR, idt_error))
    target = offset_high << 32 | offset_mid << 16 | offset_low

    if selector & ~7 == 0 or (selector | 7) > sregs.gdt.limit:
        raise AccessFailed(GuestException(GP_VECTOR, selector & ~7))
    descriptor = read_guest_virt(vcpu, sregs.gdt.base + (selector & ~7), 8, implicit=True)
    rights, more = descriptor[5], descriptor[6]
    dpl, conforming = rights >> 5 & 3, rights & 4
    if not rights & 0x80:
        raise AccessFailed(GuestException(NP_VECTOR, selector & ~7))
    if rights & 0x18 != 0x18 or not more & 0x20 or dpl > vcpu.cpl:
        raise AccessFailed(GuestException(GP_VECTOR, selector & ~7))
    cpl = vcpu.cpl if conforming else dpl

    regs = vcpu.cpu.named_gprs()
    if ist & 7 or cpl < vcpu.cpl:
        slot = 0x24 + 8 * ((ist & 7) - 1) if ist & 7 else 4 + 8 * cpl
        rsp = int.from_bytes(
            read_guest_virt(vcpu, sregs.tr.base + slot, 8, implicit=True), "little"
        )
    else:
        rsp = regs["rsp"]
    error = () if exception.error_code is None else (exception.error_code,)
    frame = struct.pack(
        f"<{5 + len(error)}Q",
        *error,
        regs["rip"] + exception.instruction_length,
        sregs.cs.selector,
        regs["rflags"],
        regs["rsp"],
        sregs.ss.selector,
    )
    rsp = ((rsp & ~15) - len(frame)) & (2**64 - 1)
    # The frame is written with the new privilege; nothing of the vCPU has changed if it cannot be.
    write_guest_virt(vcpu, rsp, frame, implicit=True, word=8)

    vcpu.cpu.write_gprs({"rsp": rsp, "rip": target})
    clear = X86_EFLAGS_TF | X86_EFLAGS_NT | X86_EFLAGS_RF | X86_EFLAGS_VM
    if kind & 0x1F == _INTERRUPT_GATE:
        clear |= X86_EFLAGS_IF
    vcpu.cpu.set("rflags", regs["rflags"] & ~clear)
    if cpl != vcpu.cpl:
        sregs.ss = uapi.kvm_segment(selector=cpl, type=3, s=1, dpl=cpl, present=1, db=1, g=1)
        sregs.ss.limit = 0xFFFFFFFF
    cs = sregs.cs
    cs.selector, cs.base, cs.limit = selector & ~3 | cpl, 0, 0xFFFFFFFF
    cs.type, cs.s, cs.dpl, cs.present = rights & 15, 1, cpl, 1
    cs.l, cs.db, cs.g = 1, 0, more >> 7
    vcpu.load_sregs()
