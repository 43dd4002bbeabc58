"""What the guest is interrupted with before it is entered: ``kvm_check_and_inject_events``.

An exception that is pending comes first, then an interrupt that was taken from the APIC and did not
get through, then a new one if the guest has interrupts on.  Where it has not, KVM has the processor
tell it when it has (an *interrupt window*); ours cannot, so the guest is executed one instruction
at a time until it has.

STI and a load of SS hold interrupts off for one instruction more, on which ``sti; hlt`` relies: no
interrupt may come between the two.  The processor does not say so either.  What can be seen is the
bytes before RIP; if they look like one of these, one more instruction is executed first.  Being
wrong about that costs nothing: an interrupt may always come an instruction later.  They are looked
at only if their page is there: nobody waits for it, and no fault is made but the guest's own.
"""

from __future__ import annotations

from guestfault.softkvm import exceptions
from guestfault.softkvm.guest_access import copy_from_guest_page, kvm_mmu_gva_to_gpa
from guestfault.softkvm.guest_mmu import write_guest_virt
from guestfault.softkvm.irq import (
    kvm_arch_interrupt_allowed,
    kvm_cpu_get_interrupt,
    kvm_cpu_has_interrupt,
    kvm_event_needs_reinjection,
    kvm_is_exception_pending,
)
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.memslots import PAGE_SIZE
from guestfault.softkvm.processor import STEPPED, Stop
from guestfault.softkvm.refusal import GuestException, Refusal
from guestfault.x86.paging import AccessKind
from guestfault.x86.registers import X86_EFLAGS_FIXED

__all__ = ["has_event", "inject_event", "must_step", "step"]

_STI, _POP_SS, _MOV_SREG, _PUSHF, _OPERAND_SIZE = 0xFB, 0x17, 0x8E, 0x9C, 0x66
_SS = 2


def has_event(vcpu: KvmVcpu) -> bool:
    """Whether something is to be delivered before the guest goes on; takes an interrupt."""
    if kvm_is_exception_pending(vcpu) or kvm_event_needs_reinjection(vcpu):
        return True
    if not kvm_cpu_has_interrupt(vcpu) or not kvm_arch_interrupt_allowed(vcpu):
        return False
    if not vcpu.shadow_passed and _interrupt_shadow(vcpu):
        return False
    vcpu.interrupt_injected = kvm_cpu_get_interrupt(vcpu)
    return vcpu.interrupt_injected is not None


def inject_event(vcpu: KvmVcpu) -> Refusal | None:
    """Deliver it.  ``None``: done; else why not, and it will be tried again."""
    vcpu.refresh_cpl()
    if vcpu.pending_exception is not None:
        return _deliver(vcpu)
    assert vcpu.interrupt_injected is not None
    vcpu.pending_exception = GuestException(vcpu.interrupt_injected)
    refusal = _deliver(vcpu)
    # A fault on the way is delivered by itself, and the interrupt after it (table 6-5 of the SDM's
    # volume 3: an interrupt is benign, the two are handled one after the other).
    vcpu.pending_exception = None
    if refusal is None:
        vcpu.interrupt_injected = None
    return refusal


def _deliver(vcpu: KvmVcpu) -> Refusal | None:
    # It is the processor that does it: what it accesses, the guest accesses.
    vcpu.emulating = False
    try:
        return exceptions.deliver(vcpu)
    finally:
        vcpu.emulating = True


def must_step(vcpu: KvmVcpu) -> bool:
    """Whether an interrupt waits for the guest to be ready (``enable_irq_window``)."""
    return kvm_cpu_has_interrupt(vcpu)


def step(vcpu: KvmVcpu) -> Stop:
    """One instruction of the guest's, while an interrupt waits.  May raise AccessFailed."""
    in_shadow = kvm_arch_interrupt_allowed(vcpu)  # else it is the instruction that could be the STI
    vcpu.emulating = False
    try:
        stop = STEPPED if _push_flags(vcpu) else vcpu.enter_guest(vcpu.cpu.step)
    finally:
        vcpu.emulating = True
    vcpu.shadow_passed = in_shadow and stop == STEPPED
    return stop


def _interrupt_shadow(vcpu: KvmVcpu) -> bool:
    """Whether the instruction before RIP looks like one that holds interrupts off."""
    code = _peek(vcpu, (vcpu.cpu.linear_rip - 2) & (2**64 - 1))
    if len(code) < 2:
        return False
    before, last = code
    return last in (_STI, _POP_SS) or (before == _MOV_SREG and last >> 3 & 7 == _SS)


def _push_flags(vcpu: KvmVcpu) -> bool:
    """PUSHF, which must not be stepped: it would push the trap flag that stepping sets."""
    cpu = vcpu.cpu
    code = _peek(vcpu, cpu.linear_rip)
    length = code.find(_PUSHF) + 1
    if length == 0 or (length == 2 and code[0] != _OPERAND_SIZE):
        return False
    wide = cpu.code_size() // 8
    if length == 2:
        wide = 4 if wide == 2 else 2
    regs = cpu.named_gprs()
    mask = {16: 0xFFFF, 32: 0xFFFFFFFF, 64: 2**64 - 1}[cpu.code_size()]
    rsp = (regs["rsp"] - wide) & mask
    flags = (regs["rflags"] | X86_EFLAGS_FIXED) & ((1 << 8 * wide) - 1)
    base = 0 if vcpu.long_mode else cpu.segment_base("ss")
    write_guest_virt(vcpu, base + rsp, flags.to_bytes(wide, "little"))
    cpu.set("rsp", regs["rsp"] & ~mask | rsp)
    cpu.skip(length)
    return True


def _peek(vcpu: KvmVcpu, linear: int) -> bytes:
    """Two bytes of code, fewer at the end of a page; none if they are not to be had at once."""
    gpa = kvm_mmu_gva_to_gpa(vcpu, linear, AccessKind.FETCH)
    if isinstance(gpa, GuestException):
        return b""
    slot = vcpu.kvm.memslots.gfn_to_memslot(gpa // PAGE_SIZE)
    if slot is None:
        return b""
    hva = slot.hva_of_gfn(gpa // PAGE_SIZE)
    if not vcpu.kvm.mm.get_user_page_fast_only(hva, False):
        return b""
    return copy_from_guest_page(vcpu, gpa, min(2, PAGE_SIZE - gpa % PAGE_SIZE)) or b""
