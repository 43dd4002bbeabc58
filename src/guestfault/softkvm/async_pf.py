"""Asynchronous page faults, begun: ``virt/kvm/async_pf.c`` and the half of x86.c that it calls.

A guest page that is not there need not stop the whole vCPU.  :func:`kvm_faultin_pfn
<guestfault.softkvm.mmu.kvm_faultin_pfn>` finds that the page would have to be waited for, and asks
:func:`kvm_arch_setup_async_pf` to have a worker wait instead.  Meanwhile the guest is told by a #PF
with a *token* where an address would be ("page not present"), if it has asked for that and can
take it, and runs something else; or the vCPU is halted here, and goes on when the page has come or
an interrupt has.

The worker, :func:`async_pf_execute`, brings the page in and ignores whether that worked: it links
its work to ``done`` and the vCPU finds out by faulting again.  That second fault is made by KVM
itself, without the guest, and is the subject of :mod:`guestfault.softkvm.async_pf_ready`.

One that is refused here is waited for by the vCPU itself, as if all this did not exist: without a
local APIC in the kernel, with interrupts off, with ``ASYNC_PF_PER_VCPU`` of them under way.
"""

from __future__ import annotations

from guestfault.softkvm.apf_state import ASYNC_PF_PER_VCPU, KvmArchAsyncPf, KvmAsyncPf
from guestfault.softkvm.guest_cache import kvm_write_guest_offset_cached
from guestfault.softkvm.irq import (
    kvm_arch_interrupt_allowed,
    kvm_event_needs_reinjection,
    kvm_is_exception_pending,
    lapic_in_kernel,
)
from guestfault.softkvm.kvm_host import (
    KvmVcpu,
    Request,
    kvm_make_request,
    kvm_vcpu_kick,
    kvm_vcpu_wake_up,
)
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.refusal import GuestException
from guestfault.uapi.kvm_para import (
    KVM_ASYNC_PF_DELIVERY_AS_INT,
    KVM_ASYNC_PF_ENABLED,
    KVM_PV_REASON_PAGE_NOT_PRESENT,
    kvm_vcpu_pv_apf_data,
)
from guestfault.x86.registers import CR0_PG, PF_VECTOR

__all__ = [
    "ASYNC_PF_PER_VCPU",
    "async_pf_execute",
    "kvm_arch_async_page_not_present",
    "kvm_arch_setup_async_pf",
    "kvm_async_pf_hash_reset",
    "kvm_async_pf_wakeup_all",
    "kvm_can_deliver_async_pf",
    "kvm_can_do_async_pf",
    "kvm_clear_async_pf_completion_queue",
    "kvm_find_async_pf_gfn",
    "kvm_is_error_hva",
    "kvm_mmu_is_direct",
    "kvm_pv_async_pf_enabled",
    "kvm_setup_async_pf",
]

_USER_END = 1 << 47
_ENABLED = KVM_ASYNC_PF_ENABLED | KVM_ASYNC_PF_DELIVERY_AS_INT


def kvm_is_error_hva(hva: int) -> bool:
    """Whether it is no host address, but says that there is none."""
    return not 0 <= hva < _USER_END


# -- virt/kvm/async_pf.c ---------------------------------------------------------------------------


def kvm_setup_async_pf(vcpu: KvmVcpu, cr2_or_gpa: int, hva: int, arch: KvmArchAsyncPf) -> bool:
    """Have a worker bring the page in; ``False``: the vCPU must wait for it itself."""
    apf = vcpu.async_pf
    if apf.queued >= ASYNC_PF_PER_VCPU or kvm_is_error_hva(hva):
        return False
    work = KvmAsyncPf(cr2_or_gpa, hva, arch)
    apf.queue.append(work)
    apf.queued += 1
    work.notpresent_injected = kvm_arch_async_page_not_present(vcpu, work)
    vcpu.kvm.schedule_work(lambda: async_pf_execute(vcpu, work))
    return True


def async_pf_execute(vcpu: KvmVcpu, work: KvmAsyncPf) -> None:
    """The worker: bring the page in, and link the work to those that are done."""
    apf, shared = vcpu.async_pf, ("apf", vcpu.vcpu_id)
    preemption_point("async_pf_execute: begin", shared)
    if work.cancelled:
        return
    preemption_point("async_pf_execute: get_user_pages_remote", ("page", work.addr), True)
    # For writing, whatever the guest wanted.  What comes of it is nobody's business here: if the
    # page cannot be had, the guest's own fault will say so.
    vcpu.kvm.mm.get_user_pages_unlocked(work.addr, True)
    preemption_point("async_pf_execute: link the work to done", shared, True)
    with apf.lock:
        if work.cancelled:
            return
        first = not apf.done
        apf.done.append(work)
    if first:
        _kvm_arch_async_page_present_queued(vcpu)
    kvm_vcpu_wake_up(vcpu)


def kvm_clear_async_pf_completion_queue(vcpu: KvmVcpu) -> None:
    """Forget all that is under way.

    Linux waits here for a worker that is in the midst of its page (``cancel_work_sync``), for the
    work is about to be freed.  Ours is left to end in its own time, and finds that it is cancelled.
    """
    apf = vcpu.async_pf
    preemption_point("kvm_clear_async_pf_completion_queue", ("apf", vcpu.vcpu_id), True)
    with apf.lock:
        for work in apf.queue:
            work.cancelled = True
        apf.queue.clear()
        apf.done.clear()
        apf.queued = 0


def kvm_async_pf_wakeup_all(vcpu: KvmVcpu) -> None:
    """Put a work into ``done`` that tells the guest to wake everybody who waits."""
    apf = vcpu.async_pf
    preemption_point("kvm_async_pf_wakeup_all: link the work", ("apf", vcpu.vcpu_id), True)
    with apf.lock:
        if apf.done:
            return
        apf.done.append(KvmAsyncPf(wakeup_all=True))
    _kvm_arch_async_page_present_queued(vcpu)
    apf.queued += 1


def _kvm_arch_async_page_present_queued(vcpu: KvmVcpu) -> None:
    """The first work has come to ``done``: have the vCPU look."""
    kvm_make_request(vcpu, Request.APF_READY)
    # A guest that has not acknowledged the last one would not be told yet: its ACK will look.
    if not vcpu.apf.pageready_pending:
        kvm_vcpu_kick(vcpu)


# -- arch/x86/kvm: whether it can be done, and what the guest is told ------------------------------


def kvm_pv_async_pf_enabled(vcpu: KvmVcpu) -> bool:
    """Whether the guest wants to know."""
    return vcpu.apf.msr_en_val & _ENABLED == _ENABLED


def kvm_can_deliver_async_pf(vcpu: KvmVcpu) -> bool:
    """Whether the guest wants to know, and could take a #PF now."""
    if not kvm_pv_async_pf_enabled(vcpu) or (vcpu.apf.send_user_only and vcpu.cpl == 0):
        return False
    # A guest that has switched paging off for a while is not ready for a #PF.
    return bool(vcpu.sregs.cr0 & CR0_PG)


def kvm_can_do_async_pf(vcpu: KvmVcpu) -> bool:
    """Whether a page may come later: whether the vCPU can be halted, or do something else.

    Not while KVM makes an access of its own: in the kernel those do not come this way, they are
    copies to and from userspace memory, which sleep.
    """
    if not lapic_in_kernel(vcpu) or vcpu.emulating:
        return False
    if kvm_event_needs_reinjection(vcpu) or kvm_is_exception_pending(vcpu):
        return False
    # With interrupts off nothing but the page could end the halt.
    return kvm_arch_interrupt_allowed(vcpu)


def kvm_mmu_is_direct(vcpu: KvmVcpu) -> bool:
    """``root_role.direct``: whether faults bring guest physical addresses."""
    return vcpu.kvm.tdp_enabled or not vcpu.sregs.cr0 & CR0_PG


def kvm_arch_setup_async_pf(
    vcpu: KvmVcpu, cr2_or_gpa: int, gfn: int, hva: int, error_code: int
) -> bool:
    """Have the page of a guest's fault come later; ``False``: it must be waited for."""
    arch = KvmArchAsyncPf(
        token=_alloc_apf_token(vcpu),
        gfn=gfn,
        cr3=int(vcpu.sregs.cr3),
        direct_map=kvm_mmu_is_direct(vcpu),
        error_code=error_code,
    )
    return kvm_setup_async_pf(vcpu, cr2_or_gpa, hva, arch)


def _alloc_apf_token(vcpu: KvmVcpu) -> int:
    """A number that names the fault to the guest, never 0: that is an empty slot."""
    apf = vcpu.apf
    if apf.id << 12 & 0xFFFFFFFF == 0:
        apf.id = 1
    token = (apf.id << 12 | vcpu.vcpu_id) & 0xFFFFFFFF
    apf.id += 1
    return token


def kvm_find_async_pf_gfn(vcpu: KvmVcpu, gfn: int) -> bool:
    """Whether a worker is at this frame already."""
    return gfn in vcpu.apf.gfns


def kvm_async_pf_hash_reset(vcpu: KvmVcpu) -> None:
    """Forget which frames workers are at."""
    vcpu.apf.gfns.clear()


def kvm_arch_async_page_not_present(vcpu: KvmVcpu, work: KvmAsyncPf) -> bool:
    """Tell the guest that a page will come later, or halt the vCPU; whether it was told."""
    vcpu.apf.gfns.add(work.arch.gfn)
    if kvm_can_deliver_async_pf(vcpu) and _apf_put_user_notpresent(vcpu):
        # kvm_inject_page_fault(): nothing is pending that it could combine with.
        vcpu.cpu.set_cr2(work.arch.token)
        vcpu.pending_exception = GuestException(PF_VECTOR, 0, work.arch.token)
        kvm_make_request(vcpu, Request.EVENT)
        return True
    kvm_make_request(vcpu, Request.APF_HALT)
    return False


def _apf_put_user_notpresent(vcpu: KvmVcpu) -> bool:
    """Write the reason of the #PF that follows; whether that worked."""
    cache = vcpu.apf.data
    if cache is None:
        return False
    kvm = vcpu.kvm
    reason = KVM_PV_REASON_PAGE_NOT_PRESENT.to_bytes(4, "little")
    at = kvm_vcpu_pv_apf_data.flags.offset
    r = kvm_write_guest_offset_cached(cache, reason, at, kvm.memslots, kvm.mm, kvm.second_stage)
    return r == 0
