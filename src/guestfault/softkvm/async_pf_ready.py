"""Asynchronous page faults, ended: the page has come, and the guest is to hear of it.

:func:`kvm_check_async_pf_completion` runs with the vCPU loaded, in two places: before the guest is
entered (``KVM_REQ_APF_READY``), and where MSR_KVM_ASYNC_PF_ACK is written, by the guest or by
userspace with ``KVM_SET_MSRS``, when nobody is in KVM_RUN at all.

For each work that is done, :func:`kvm_arch_async_page_ready` makes the guest's fault again, so that
the guest will find the page mapped.  **It drops the result**: if the page could not be had, the
fault path has annotated ``kvm_run`` and returned -EFAULT, and nobody leaves for userspace.  That is
the case with which the thread's question begins.  Then :func:`kvm_arch_async_page_present` tells
the guest by an interrupt, or lets the halted vCPU go on.
"""

from __future__ import annotations

from guestfault.softkvm.apf_state import KvmAsyncPf
from guestfault.softkvm.async_pf import (
    kvm_async_pf_hash_reset,
    kvm_async_pf_wakeup_all,
    kvm_clear_async_pf_completion_queue,
    kvm_mmu_is_direct,
    kvm_pv_async_pf_enabled,
)
from guestfault.softkvm.guest_cache import (
    kvm_gfn_to_hva_cache_init,
    kvm_read_guest_offset_cached,
    kvm_write_guest_offset_cached,
)
from guestfault.softkvm.irq import kvm_apic_set_irq, kvm_lapic_enabled, lapic_in_kernel
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.mmu import kvm_mmu_do_page_fault
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.shadow_context import kvm_mmu_reload
from guestfault.uapi import kvm as uapi
from guestfault.uapi.kvm_para import (
    KVM_ASYNC_PF_DELIVERY_AS_PF_VMEXIT,
    KVM_ASYNC_PF_SEND_ALWAYS,
    kvm_vcpu_pv_apf_data,
)

__all__ = [
    "kvm_arch_async_page_present",
    "kvm_arch_async_page_ready",
    "kvm_arch_can_dequeue_async_page_present",
    "kvm_check_async_pf_completion",
    "kvm_pv_async_pf_ack",
    "kvm_pv_enable_async_pf",
    "kvm_pv_enable_async_pf_int",
]

_TOKEN_AT = kvm_vcpu_pv_apf_data.token.offset
_TOKEN_SIZE = kvm_vcpu_pv_apf_data.token.size
_USED = 8  # bytes of the structure: flags and token
_ADDRESS = ~0x3F
_RESERVED = 0x30
_VECTOR = 0xFF  # KVM_ASYNC_PF_VEC_MASK, which the header leaves to the kernel
_EVERYBODY = 0xFFFFFFFF


def kvm_check_async_pf_completion(vcpu: KvmVcpu) -> None:
    """Report every work that is done, as long as the guest can be told.  The vCPU is loaded."""
    apf, shared = vcpu.async_pf, ("apf", vcpu.vcpu_id)
    while True:
        preemption_point("kvm_check_async_pf_completion: look at done", shared)
        if not apf.done or not kvm_arch_can_dequeue_async_page_present(vcpu):
            return
        preemption_point("kvm_check_async_pf_completion: take one", shared, True)
        with apf.lock:
            work = apf.done.popleft()
        kvm_arch_async_page_ready(vcpu, work)
        kvm_arch_async_page_present(vcpu, work)
        if not work.wakeup_all:
            apf.queue.remove(work)
        apf.queued -= 1


def kvm_arch_can_dequeue_async_page_present(vcpu: KvmVcpu) -> bool:
    """Whether the guest can be told of one more: it has read the last token, if it wants any."""
    if not kvm_pv_async_pf_enabled(vcpu):
        return True
    return kvm_lapic_enabled(vcpu) and _apf_pageready_slot_free(vcpu)


def kvm_arch_async_page_ready(vcpu: KvmVcpu, work: KvmAsyncPf) -> None:
    """Make the guest's fault again, unless the guest has gone elsewhere.  Nobody asks how it went.

    It is made as a read, even where the guest was about to write, up to the kernels that keep the
    original error code (``async_pf_error_code`` of the dialect).
    """
    if work.wakeup_all or work.arch.direct_map != kvm_mmu_is_direct(vcpu):
        return
    if kvm_mmu_reload(vcpu) < 0:
        return
    if not work.arch.direct_map and work.arch.cr3 != vcpu.sregs.cr3:
        return
    saved = work.arch.error_code if vcpu.kvm.dialect.async_pf_error_code else 0
    kvm_mmu_do_page_fault(vcpu, work.cr2_or_gpa, saved, prefetch=True)


def kvm_arch_async_page_present(vcpu: KvmVcpu, work: KvmAsyncPf) -> None:
    """Tell the guest that the page is there, or that all are; end the vCPU's halt."""
    apf = vcpu.apf
    if work.wakeup_all:
        work.arch.token = _EVERYBODY
    else:
        apf.gfns.discard(work.arch.gfn)
    if (
        (work.wakeup_all or work.notpresent_injected)
        and kvm_pv_async_pf_enabled(vcpu)
        and _apf_put_user_ready(vcpu, work.arch.token)
    ):
        apf.pageready_pending = True
        kvm_apic_set_irq(vcpu, apf.vec)
    apf.halted = False
    vcpu.mp_state = uapi.KVM_MP_STATE_RUNNABLE


def _apf_put_user_ready(vcpu: KvmVcpu, token: int) -> bool:
    if vcpu.apf.data is None:
        return False
    kvm, data = vcpu.kvm, token.to_bytes(_TOKEN_SIZE, "little")
    r = kvm_write_guest_offset_cached(
        vcpu.apf.data, data, _TOKEN_AT, kvm.memslots, kvm.mm, kvm.second_stage
    )
    return r == 0


def _apf_pageready_slot_free(vcpu: KvmVcpu) -> bool:
    if vcpu.apf.data is None:
        return False
    kvm = vcpu.kvm
    token = kvm_read_guest_offset_cached(
        vcpu.apf.data, _TOKEN_AT, _TOKEN_SIZE, kvm.memslots, kvm.mm
    )
    return token is not None and not any(token)


# -- the MSRs --------------------------------------------------------------------------------------


def kvm_pv_enable_async_pf(vcpu: KvmVcpu, data: int) -> bool:
    """A write of MSR_KVM_ASYNC_PF_EN; ``False``: #GP."""
    if data & _RESERVED:
        return False
    if not lapic_in_kernel(vcpu):
        return data == 0
    apf = vcpu.apf
    apf.msr_en_val = data
    if not kvm_pv_async_pf_enabled(vcpu):
        kvm_clear_async_pf_completion_queue(vcpu)
        kvm_async_pf_hash_reset(vcpu)
        return True
    preemption_point("kvm_pv_enable_async_pf: find the slot", "memslots")
    apf.data = kvm_gfn_to_hva_cache_init(vcpu.kvm.memslots, data & _ADDRESS, _USED)
    if apf.data is None:
        return False
    apf.send_user_only = not data & KVM_ASYNC_PF_SEND_ALWAYS
    apf.delivery_as_pf_vmexit = bool(data & KVM_ASYNC_PF_DELIVERY_AS_PF_VMEXIT)
    kvm_async_pf_wakeup_all(vcpu)
    return True


def kvm_pv_enable_async_pf_int(vcpu: KvmVcpu, data: int) -> bool:
    """A write of MSR_KVM_ASYNC_PF_INT: the vector of "page ready"; ``False``: #GP."""
    if data & ~_VECTOR or not lapic_in_kernel(vcpu):
        return False
    vcpu.apf.msr_int_val = vcpu.apf.vec = data
    return True


def kvm_pv_async_pf_ack(vcpu: KvmVcpu, data: int) -> bool:
    """A write of MSR_KVM_ASYNC_PF_ACK: the guest has read the token, and can be told of more."""
    if data & 1:
        vcpu.apf.pageready_pending = False
        kvm_check_async_pf_completion(vcpu)
    return True
