"""A second-stage page fault: from a guest physical access to an entry for it, or why there is none.

This is the part of ``arch/x86/kvm/mmu/mmu.c`` that the seed thread argues about, under its names.
:func:`kvm_mmu_page_fault` is what a violation of the second stage calls, and the first to ask is
whether the frame is known to be no memory (:mod:`~guestfault.softkvm.mmio_cache`).
:func:`kvm_mmu_do_page_fault` makes the fault, and is where the two callers of the thread part: the
violation hands a negative result on to userspace, a completed asynchronous fault drops it.
:func:`direct_page_fault` handles it under two-dimensional paging.

On the way each question may end the fault: is the write one that KVM must see
(:mod:`~guestfault.softkvm.page_track`)?  Is the page there, and only write-protected
(:mod:`~guestfault.softkvm.fast_page_fault`)?  :func:`kvm_faultin_pfn` then finds the host page:
is it of the memory that the access wants (:mod:`~guestfault.softkvm.private_fault`), is the slot
going, is there one, does userspace want the page left alone (:mod:`~guestfault.softkvm.userfault`),
is there a file for it (:mod:`~guestfault.softkvm.guest_memfd`), must it be waited for, and may the
guest do something else meanwhile (:mod:`~guestfault.softkvm.async_pf`)?
:func:`kvm_handle_error_pfn` ends in the -EFAULT, annotated or bare, and :func:`direct_map` installs
the entry.

The race with an invalidation is Linux's ``mmu_invalidate_seq``: a fault notes the sequence, looks
the page up without the lock, takes the lock, and starts again if something was zapped in between.
The kernel reads it just before it looks for the page, here it is read first of all, for zapping a
slot advances it, too.  A slot that is found stays good for as long as the fault lasts
(:mod:`guestfault.softkvm.srcu`).  Nothing is allocated beforehand for the time under the lock
(``mmu_topup_memory_caches``), and the table does not grow too large (``make_mmu_pages_available``
is shadow paging's).
"""

from __future__ import annotations

import errno

from guestfault.dialect.record import Reason, Site
from guestfault.linux.sigbus import send_sigbus
from guestfault.softkvm import preempt
from guestfault.softkvm.async_pf import (
    kvm_arch_setup_async_pf,
    kvm_can_do_async_pf,
    kvm_find_async_pf_gfn,
)
from guestfault.softkvm.efault import kvm_handle_efault
from guestfault.softkvm.fast_page_fault import fast_page_fault
from guestfault.softkvm.kvm_host import KvmVcpu, Request, kvm_make_request
from guestfault.softkvm.memslots import KVM_MEMSLOT_INVALID
from guestfault.softkvm.mmio_cache import handle_mmio_page_fault, vcpu_cache_mmio_info
from guestfault.softkvm.mmu_internal import KvmPageFault, RetPf
from guestfault.softkvm.page_track import kvm_slot_page_track_is_active
from guestfault.softkvm.pfn import (
    KVM_PFN_ERR_FAULT,
    KVM_PFN_ERR_HWPOISON,
    KVM_PFN_ERR_MASK,
    KVM_PFN_ERR_RO_FAULT,
    KVM_PFN_ERR_SIGPENDING,
    KVM_PFN_NOSLOT,
    gfn_to_pfn_memslot,
)
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.private_fault import faultin_pfn_of_two, private_access, private_emulation
from guestfault.softkvm.processor import MAX_PHYS
from guestfault.softkvm.refusal import Emulate, Exit, Retry
from guestfault.softkvm.second_stage import (
    PAGE_SIZE,
    PT_READ,
    PT_WRITABLE,
    SPTE_HOST_WRITABLE,
    SPTE_MMIO,
    SPTE_MMU_WRITABLE,
    SPTE_PRIVATE,
    make_mmio_spte,
)
from guestfault.softkvm.userfault import kvm_do_userfault
from guestfault.uapi import kvm as uapi
from guestfault.x86.paging import AccessKind
from guestfault.x86.registers import (
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_WRITE_MASK,
)

__all__ = [
    "direct_page_fault",
    "is_page_fault_stale",
    "kvm_faultin_pfn",
    "kvm_mmu_do_page_fault",
    "kvm_mmu_page_fault",
    "page_fault_handle_page_track",
    "private_direct_page_fault",
]


# What other threads share with the fault path, as preemption points name it.
_MMU, _MEMSLOTS = "mmu", "memslots"

# An attribute of an enumeration is a slow thing to ask for, and a fault asks several times.
_CONTINUE, _RETRY, _EMULATE = int(RetPf.CONTINUE), int(RetPf.RETRY), int(RetPf.EMULATE)
_INVALID, _FIXED, _SPURIOUS = int(RetPf.INVALID), int(RetPf.FIXED), int(RetPf.SPURIOUS)
_MISSING, _UNKNOWN, _HANDLE_ERROR_PFN = Reason.MISSING, Reason.UNKNOWN, Site.HANDLE_ERROR_PFN

_EFAULT, _TRY_AGAIN = Exit(-errno.EFAULT), Retry()
_MAX_GFN = (MAX_PHYS >> 12) - 1


def kvm_mmu_page_fault(vcpu: KvmVcpu, cr2_or_gpa: int, error_code: int) -> bool:
    """A violation of the second stage: whether the guest may make its access again at once.

    If not, ``vcpu.refusal`` says what comes before: the kernel performs the instruction here, or
    returns to whoever runs the guest; our processor is in the midst of the instruction, and must
    stop first.  (Under shadow paging the address is a linear one; the caller puts the physical one
    in its place, or the guest's own fault that the walk has met.)
    """
    kvm = vcpu.kvm
    if kvm.has_private_mem and kvm.dialect.private_in_error_code:
        error_code = private_access(vcpu, cr2_or_gpa, error_code)
    r = _INVALID
    if error_code & PFERR_RSVD_MASK:
        r = handle_mmio_page_fault(vcpu, cr2_or_gpa)
    if r == _INVALID:
        r = kvm_mmu_do_page_fault(vcpu, cr2_or_gpa, error_code)
    if r >= _FIXED:  # or SPURIOUS
        return True
    if r == _INVALID:  # KVM_BUG
        kvm.warn_on_once("kvm_mmu_page_fault: nobody has handled the fault")
        r = -errno.EIO
    if r < 0:
        vcpu.refusal = _EFAULT if r == -errno.EFAULT else Exit(r)
    elif r == _EMULATE:
        vcpu.refusal = Emulate(cr2_or_gpa, _kind(error_code), error_code, cr2_or_gpa)
    else:
        # Something is being changed.  Back to the run loop, as in the kernel: somebody may want
        # more of this vCPU than that it tries again.
        vcpu.refusal = _TRY_AGAIN
    return False


def _kind(error_code: int) -> AccessKind:
    if error_code & PFERR_WRITE_MASK:
        return AccessKind.WRITE
    return AccessKind.FETCH if error_code & PFERR_FETCH_MASK else AccessKind.READ


# -- the fault -------------------------------------------------------------------------------------


def kvm_mmu_do_page_fault(
    vcpu: KvmVcpu, cr2_or_gpa: int, error_code: int, *, prefetch: bool = False
) -> int:
    """Handle one second-stage fault: a :class:`RetPf`, or a negative errno for ``KVM_RUN``.

    The root of the thread's question: :func:`kvm_mmu_page_fault` hands a negative result on to
    userspace, ``kvm_arch_async_page_ready`` drops it.
    """
    fault = KvmPageFault(
        cr2_or_gpa,
        error_code,
        prefetch,
        cr2_or_gpa >> 12,
        error_code & PFERR_WRITE_MASK != 0,
    )
    if not prefetch:
        vcpu.stat.pf_taken += 1
    page_fault = vcpu.mmu_page_fault
    r = direct_page_fault(vcpu, fault) if page_fault is None else page_fault(vcpu, fault)
    if r == _FIXED:
        vcpu.stat.pf_fixed += 1
    elif r == _SPURIOUS and not prefetch:
        vcpu.stat.pf_spurious += 1
    elif r == _EMULATE and not prefetch:
        vcpu.stat.pf_emulate += 1
    return r


def direct_page_fault(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """A fault under two-dimensional paging: find the page, then install its entry."""
    kvm = vcpu.kvm
    stage = kvm.second_stage
    # Read the sequence before anything is looked up: what changes later changes it too.
    if preempt.scheduler is not None:
        preemption_point("direct_page_fault: read mmu_invalidate_seq", _MMU)
    fault.mmu_seq = stage.mmu_invalidate_seq
    if preempt.scheduler is not None:
        preemption_point("direct_page_fault: find the slot", _MEMSLOTS)
    memslots = kvm.memslots
    fault.slot, fault.generation = memslots.gfn_to_memslot(fault.gfn), memslots.generation
    if fault.error_code & PFERR_PRESENT_MASK:  # the two are about pages that are there
        if page_fault_handle_page_track(vcpu, fault):
            return _EMULATE
        r: int = fast_page_fault(vcpu, fault)
        if r != _INVALID:
            return r
    r = kvm_faultin_pfn(vcpu, fault)
    if r != _CONTINUE:
        return r
    if preempt.scheduler is not None:
        preemption_point("direct_page_fault: take mmu_lock", _MMU, True)
    with stage.mmu_lock:
        # is_page_fault_stale(), where there are no roots to be obsolete.
        if fault.slot is not None and stage.mmu_invalidate_retry(
            fault.mmu_seq, fault.pfn << 12, fault.gfn
        ):
            return _RETRY
        return direct_map(vcpu, fault)


def private_direct_page_fault(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """The same in a VM that has private memory.

    What stands here does so in ``kvm_mmu_do_page_fault``, for every VM.  A fault whose error code
    does not say whether it is private is what the frame is now, a prefetch too.
    """
    if not vcpu.kvm.dialect.private_in_error_code:
        fault.error_code = private_access(vcpu, fault.addr, fault.error_code)
    r = direct_page_fault(vcpu, fault)
    if r == _EMULATE and fault.is_private:
        return private_emulation(vcpu, fault)
    return r


def page_fault_handle_page_track(vcpu: KvmVcpu, fault: KvmPageFault) -> bool:
    """Whether it is a write to a page that is there, and KVM must see it (and so must make it)."""
    if fault.error_code & PFERR_RSVD_MASK or not fault.write:
        return False
    if not fault.error_code & PFERR_PRESENT_MASK:
        return False
    preemption_point("page_fault_handle_page_track: is the gfn tracked", _MMU)
    return kvm_slot_page_track_is_active(fault.slot, fault.gfn)


def is_page_fault_stale(vcpu: KvmVcpu, fault: KvmPageFault) -> bool:
    """Whether what the fault found may have been taken away since.  ``mmu_lock`` is held."""
    if vcpu.mmu is not None and vcpu.mmu.is_obsolete():
        return True
    if fault.slot is None:
        return False
    return vcpu.kvm.second_stage.mmu_invalidate_retry(fault.mmu_seq, fault.pfn << 12, fault.gfn)


# -- the page --------------------------------------------------------------------------------------


def kvm_faultin_pfn(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """Find the host page behind the fault's gfn: CONTINUE with it, or how the fault ends."""
    kvm = vcpu.kvm
    if kvm.has_gmem:
        r = faultin_pfn_of_two(vcpu, fault)
        if r != _INVALID:
            return r
    if kvm.userfault_flag and kvm_do_userfault(vcpu, fault):
        return -errno.EFAULT
    slot = fault.slot
    if slot is None:
        return kvm_handle_noslot_fault(vcpu, fault)
    if slot.flags & KVM_MEMSLOT_INVALID:
        # Its entries are being zapped.  It must not pass for MMIO before they are.
        return _RETRY
    # Exit as soon as fast GUP fails, rather than sleep in slow GUP: what the slot's flag asks for.
    fast_reads, needs_wait = kvm.fast_gup_reads, False
    if slot.flags & kvm.missing_flag or kvm.mem_fault_nowait:
        fault.atomic = True
        fault.pfn, fault.map_writable, _ = gfn_to_pfn_memslot(
            kvm.mm, slot, fault.gfn, fault.write, True, fast_reads=fast_reads
        )
    else:
        # The kernel asks without waiting first in any case.  Where nobody could use the answer, the
        # next thing it does is to ask again and wait: so the first question is left out there.
        nowait = not fault.prefetch and kvm_can_do_async_pf(vcpu)
        fault.pfn, fault.map_writable, needs_wait = gfn_to_pfn_memslot(
            kvm.mm,
            slot,
            fault.gfn,
            fault.write,
            False,
            nowait,
            None if nowait else vcpu,
            fast_reads,
        )
    if needs_wait:
        if kvm_find_async_pf_gfn(vcpu, fault.gfn):
            # The guest has been told and is here again: it cannot do without.
            kvm_make_request(vcpu, Request.APF_HALT)
            return _RETRY
        if kvm_arch_setup_async_pf(vcpu, fault.addr, fault.gfn, fault.hva, fault.error_code):
            return _RETRY
        fault.pfn, fault.map_writable, _ = gfn_to_pfn_memslot(
            kvm.mm, slot, fault.gfn, fault.write, interruptible=vcpu, fast_reads=fast_reads
        )
    if fault.pfn & KVM_PFN_ERR_MASK:  # is_error_pfn()
        if kvm.mem_fault_nowait and fault.pfn == KVM_PFN_ERR_FAULT:
            # Where v1 filled kvm_run, for kvm_handle_error_pfn to return the -EFAULT.
            kvm_handle_efault(
                vcpu, Site.FAULTIN_PFN, fault.gfn << 12, PAGE_SIZE, reason=Reason.MISSING
            )
        return kvm_handle_error_pfn(vcpu, fault)
    return _CONTINUE


def kvm_handle_noslot_fault(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """No slot holds the frame: an access to a device, which the emulator turns into an exit.

    CONTINUE, for an entry to say so from now on; EMULATE at once where there is to be none.
    """
    fault.pfn, fault.map_writable = KVM_PFN_NOSLOT, False
    gva = 0 if vcpu.kvm.tdp_enabled else fault.addr
    vcpu_cache_mmio_info(vcpu, gva, fault.gfn, fault.generation)
    if not vcpu.kvm.enable_mmio_caching or fault.gfn > _MAX_GFN:
        return _EMULATE
    return _CONTINUE


def kvm_send_hwpoison_signal(fault: KvmPageFault) -> None:
    """To the thread that runs the vCPU, which does not survive it unprepared (linux.sigbus)."""
    send_sigbus(fault.hva, PAGE_SIZE.bit_length() - 1)


def kvm_handle_error_pfn(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """The end of a failed access.  The last lines are where upstream's -EFAULT is still bare."""
    pfn = fault.pfn
    if pfn == KVM_PFN_ERR_SIGPENDING:
        vcpu.run.exit_reason = uapi.KVM_EXIT_INTR
        return -errno.EINTR
    if pfn == KVM_PFN_ERR_RO_FAULT:
        return _EMULATE
    if pfn == KVM_PFN_ERR_HWPOISON:
        kvm_send_hwpoison_signal(fault)
        # The kernel retries, and finds the signal pending before it enters the guest again.  (For
        # a thread that blocks it and has not opened it in KVM_RUN it would go round for ever.)
        vcpu.run.exit_reason = uapi.KVM_EXIT_INTR
        return -errno.EINTR
    return kvm_handle_efault(
        vcpu,
        _HANDLE_ERROR_PFN,
        fault.gfn << 12,
        PAGE_SIZE,
        write=fault.write,
        exec_=fault.exec,
        reason=_MISSING if fault.atomic else _UNKNOWN,
    )


# -- the entry -------------------------------------------------------------------------------------


def direct_map(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """Install the entry.  ``mmu_lock`` is held and the fault is not stale."""
    slot, gfn = fault.slot, fault.gfn
    sptes = vcpu.kvm.second_stage.sptes
    old = sptes.get(gfn, 0)
    if slot is None:
        if old & PT_READ:
            return _RETRY  # a slot has come since, and another vCPU was here first
        vcpu.stat.pf_mmio_spte_created += 1
        sptes[gfn] = make_mmio_spte(fault.generation)
        return _EMULATE
    if old & SPTE_MMIO:
        old = 0  # stale, or nobody would look further than at it
    spte = fault.pfn << 12 | PT_READ
    if slot.gmem is not None and fault.is_private:
        spte |= SPTE_PRIVATE
    if fault.map_writable:
        spte |= SPTE_HOST_WRITABLE
        if gfn in slot.gfn_write_track:
            if fault.write:
                # It became tracked when the fault was past the question.
                return _EMULATE
        else:
            spte |= SPTE_MMU_WRITABLE
            if fault.write or not slot.dirty_bitmap:
                # With a dirty log, a page becomes writable only by the write that is then logged.
                # (The kernel logs at the read already, if the page may be written.)
                spte |= PT_WRITABLE
    if fault.write:
        slot.mark_page_dirty(gfn)
    if old | spte == old:
        return _SPURIOUS
    sptes[gfn] = old | spte
    return _FIXED
