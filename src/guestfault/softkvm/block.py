"""A vCPU that does not run: HLT, the artificial halt for a page, and what ends them.

Without a local APIC in the kernel none of this happens: HLT is an exit to userspace.  With one the
vCPU sleeps in its own KVM_RUN (:func:`vcpu_block`) until there is something for it: an interrupt
that it can take, an exception, or a page that has come.  A signal, which is what a kick is, ends
the sleep too, and KVM_RUN then returns -EINTR with the vCPU as halted as it was.
"""

from __future__ import annotations

from guestfault.softkvm.internal_error import decode
from guestfault.softkvm.irq import (
    kvm_arch_interrupt_allowed,
    kvm_cpu_has_interrupt,
    kvm_is_exception_pending,
    lapic_in_kernel,
)
from guestfault.softkvm.kvm_host import KvmVcpu, Request, kvm_test_request
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.srcu import kvm_vcpu_srcu_read_lock, kvm_vcpu_srcu_read_unlock
from guestfault.uapi import kvm as uapi

__all__ = [
    "kvm_arch_vcpu_runnable",
    "kvm_emulate_halt",
    "kvm_vcpu_block",
    "kvm_vcpu_has_events",
    "kvm_vcpu_running",
    "vcpu_block",
]


def kvm_emulate_halt(vcpu: KvmVcpu) -> int:
    """HLT: sleep here, or let userspace."""
    vcpu.cpu.skip(decode(vcpu).len)
    vcpu.stat.halt_exits += 1
    if lapic_in_kernel(vcpu):
        vcpu.mp_state = uapi.KVM_MP_STATE_HALTED
        return 1
    vcpu.run.exit_reason = uapi.KVM_EXIT_HLT
    return 0


def kvm_vcpu_running(vcpu: KvmVcpu) -> bool:
    """Whether it is neither halted by the guest nor for a page."""
    return vcpu.mp_state == uapi.KVM_MP_STATE_RUNNABLE and not vcpu.apf.halted


def kvm_vcpu_has_events(vcpu: KvmVcpu) -> bool:
    """Whether there is something that ends a halt."""
    preemption_point("kvm_vcpu_has_events: look at done", ("apf", vcpu.vcpu_id))
    if vcpu.async_pf.done or kvm_is_exception_pending(vcpu):
        return True
    return kvm_cpu_has_interrupt(vcpu) and kvm_arch_interrupt_allowed(vcpu)


def kvm_arch_vcpu_runnable(vcpu: KvmVcpu) -> bool:
    """Whether it can go on."""
    return kvm_vcpu_running(vcpu) or kvm_vcpu_has_events(vcpu)


def kvm_vcpu_block(vcpu: KvmVcpu) -> None:
    """Sleep until the vCPU can go on, or a signal is pending."""
    kvm_vcpu_srcu_read_unlock(vcpu)
    while True:
        vcpu.wait.prepare("kvm_vcpu_block: set_current_state")
        if _kvm_vcpu_check_block(vcpu):
            break
        vcpu.wait.sleep("kvm_vcpu_block: schedule")
    kvm_vcpu_srcu_read_lock(vcpu)


def _kvm_vcpu_check_block(vcpu: KvmVcpu) -> bool:
    """Whether there is no reason to sleep."""
    if kvm_arch_vcpu_runnable(vcpu):
        return True
    preemption_point("kvm_vcpu_check_block: is a signal pending", vcpu.shared)
    return kvm_test_request(vcpu, Request.SIGNAL)


def vcpu_block(vcpu: KvmVcpu) -> int:
    """What vcpu_run() does with a vCPU that is halted: always 1, go on."""
    if not kvm_arch_vcpu_runnable(vcpu):
        kvm_vcpu_block(vcpu)
        if not kvm_arch_vcpu_runnable(vcpu):
            return 1  # a signal: it stays as halted as it is
    if vcpu.mp_state == uapi.KVM_MP_STATE_HALTED:
        vcpu.mp_state = uapi.KVM_MP_STATE_RUNNABLE
    vcpu.apf.halted = False
    return 1
