"""Whether a vCPU has an interrupt, and whether it can take it: ``arch/x86/kvm/irq.c``."""

from __future__ import annotations

from guestfault.softkvm.kvm_host import KvmVcpu, Request, kvm_make_request, kvm_vcpu_kick
from guestfault.softkvm.preempt import preemption_point
from guestfault.x86.registers import X86_EFLAGS_IF

__all__ = [
    "kvm_apic_set_irq",
    "kvm_arch_interrupt_allowed",
    "kvm_cpu_get_interrupt",
    "kvm_cpu_has_interrupt",
    "kvm_event_needs_reinjection",
    "kvm_is_exception_pending",
    "kvm_lapic_enabled",
    "lapic_in_kernel",
]


def lapic_in_kernel(vcpu: KvmVcpu) -> bool:
    """Whether the vCPU has a local APIC here (``KVM_CREATE_IRQCHIP``)."""
    return vcpu.apic is not None


def kvm_lapic_enabled(vcpu: KvmVcpu) -> bool:
    """Whether the guest has switched it on."""
    return vcpu.apic is not None and vcpu.apic.enabled


def kvm_apic_set_irq(vcpu: KvmVcpu, vector: int) -> bool:
    """Make a fixed interrupt pending and have the vCPU look; ``False`` if its APIC is off."""
    preemption_point("kvm_apic_set_irq: set the bit in IRR", ("lapic", vcpu.vcpu_id), True)
    if vcpu.apic is None or not vcpu.apic.accept_irq(vector):
        return False
    kvm_make_request(vcpu, Request.EVENT)
    kvm_vcpu_kick(vcpu)
    return True


def kvm_cpu_has_interrupt(vcpu: KvmVcpu) -> bool:
    """Whether an interrupt of sufficient priority is pending."""
    if vcpu.apic is None:
        return False
    preemption_point("kvm_cpu_has_interrupt: look at IRR", ("lapic", vcpu.vcpu_id))
    return vcpu.apic.has_interrupt() is not None


def kvm_cpu_get_interrupt(vcpu: KvmVcpu) -> int | None:
    """Take the interrupt that is next from the APIC."""
    preemption_point("kvm_cpu_get_interrupt: from IRR to ISR", ("lapic", vcpu.vcpu_id), True)
    return None if vcpu.apic is None else vcpu.apic.get_interrupt()


def kvm_arch_interrupt_allowed(vcpu: KvmVcpu) -> bool:
    """Whether the guest has interrupts on.  Of the shadow of STI see :mod:`.x86`."""
    return vcpu.rflags & X86_EFLAGS_IF != 0


def kvm_is_exception_pending(vcpu: KvmVcpu) -> bool:
    """Whether an exception waits to be delivered."""
    return vcpu.pending_exception is not None


def kvm_event_needs_reinjection(vcpu: KvmVcpu) -> bool:
    """Whether an interrupt was taken from the APIC and has not got to the guest yet."""
    return vcpu.interrupt_injected is not None
