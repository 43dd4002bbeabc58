"""A second-stage page fault: from a guest physical access to an entry for it, or why there is none.

This is the part of ``arch/x86/kvm/mmu/mmu.c`` that the seed thread argues about, under its names:
:func:`kvm_mmu_do_page_fault` takes the failed access, :func:`kvm_faultin_pfn` finds the host page,
:func:`kvm_handle_error_pfn` ends in the -EFAULT, annotated or bare, :func:`direct_map` installs the
entry.

The race with an invalidation is Linux's ``mmu_invalidate_seq``: a fault notes the sequence, looks
the page up without the lock, takes the lock, and starts again if something was zapped in between.
"""

from __future__ import annotations

import errno

from guestfault.dialect.interface import EHWPOISON
from guestfault.softkvm.efault import kvm_handle_efault
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.mmu_internal import KvmPageFault, RetPf
from guestfault.softkvm.pfn import (
    KVM_PFN_ERR_HWPOISON,
    KVM_PFN_ERR_RO_FAULT,
    KVM_PFN_ERR_SIGPENDING,
    KVM_PFN_NOSLOT,
    gfn_to_pfn_memslot,
    is_error_pfn,
)
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.second_stage import PAGE_SIZE, PT_READ, PT_WRITABLE
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import PFERR_WRITE_MASK

__all__ = ["kvm_mmu_do_page_fault"]


# What other threads share with the fault path, as preemption points name it.
_MMU, _MEMSLOTS = "mmu", "memslots"

# An attribute of an enumeration is a slow thing to ask for, and a fault asks several times.
_CONTINUE, _RETRY, _EMULATE = RetPf.CONTINUE, RetPf.RETRY, RetPf.EMULATE
_FIXED, _SPURIOUS = RetPf.FIXED, RetPf.SPURIOUS


def kvm_mmu_do_page_fault(
    vcpu: KvmVcpu, cr2_or_gpa: int, error_code: int, *, prefetch: bool = False
) -> int:
    """Handle one second-stage fault: a :class:`RetPf`, or a negative errno for ``KVM_RUN``.

    The root of the thread's question: ``kvm_mmu_page_fault`` hands a negative result on to
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
    r = direct_page_fault(vcpu, fault)
    if r == _FIXED:
        vcpu.stat.pf_fixed += 1
    elif r == _SPURIOUS and not prefetch:
        vcpu.stat.pf_spurious += 1
    elif r == _EMULATE and not prefetch:
        vcpu.stat.pf_emulate += 1
    return r


def direct_page_fault(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """A fault under two-dimensional paging: find the page, then install its entry."""
    stage = vcpu.kvm.second_stage
    # Read the sequence before anything is looked up: what changes later changes it too.
    preemption_point("direct_page_fault: read mmu_invalidate_seq", _MMU)
    fault.mmu_seq = stage.mmu_invalidate_seq
    preemption_point("direct_page_fault: find the slot", _MEMSLOTS)
    fault.slot = vcpu.kvm.memslots.gfn_to_memslot(fault.gfn)
    r = kvm_faultin_pfn(vcpu, fault)
    if r != _CONTINUE:
        return r
    preemption_point("direct_page_fault: take mmu_lock", _MMU, True)
    with stage.mmu_lock:
        if stage.mmu_invalidate_retry(fault.mmu_seq):
            return _RETRY
        return direct_map(vcpu, fault)


def kvm_faultin_pfn(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """Find the host page behind the fault's gfn, or say why there is none."""
    if fault.slot is None:
        return kvm_handle_noslot_fault(fault)
    # Exit as soon as fast GUP fails, rather than sleep in slow GUP: what the slot's flag asks for.
    atomic = fault.slot.flags & vcpu.kvm.missing_flag != 0
    fault.pfn, fault.map_writable = gfn_to_pfn_memslot(
        vcpu.kvm.mm, fault.slot, fault.gfn, atomic=atomic, write_fault=fault.write
    )
    if is_error_pfn(fault.pfn):
        return kvm_handle_error_pfn(vcpu, fault)
    return _CONTINUE


def kvm_handle_noslot_fault(fault: KvmPageFault) -> int:
    """No slot holds the frame: an access to a device, which the emulator turns into an exit."""
    fault.pfn = KVM_PFN_NOSLOT
    return _EMULATE


def kvm_handle_error_pfn(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """The end of a failed access.  The last lines are where upstream's -EFAULT is still bare."""
    if fault.pfn == KVM_PFN_ERR_SIGPENDING:
        vcpu.run.exit_reason = uapi.KVM_EXIT_INTR
        return -errno.EINTR
    if fault.pfn == KVM_PFN_ERR_RO_FAULT:
        return _EMULATE
    if fault.pfn == KVM_PFN_ERR_HWPOISON:
        # The kernel sends SIGBUS (BUS_MCEERR_AR) to the thread and retries.  We cannot raise a
        # signal on behalf of memory that this very thread would then have to survive touching.
        return -EHWPOISON
    kvm = vcpu.kvm
    if kvm.annotates_error_pfn:
        assert fault.slot is not None
        asked = fault.slot.flags & kvm.missing_flag
        flags = kvm.dialect.flag_missing if asked else kvm.dialect.flag_unknown
        return kvm_handle_efault(vcpu, fault.gfn << 12, PAGE_SIZE, flags)
    return -errno.EFAULT


def direct_map(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """Install the entry.  ``mmu_lock`` is held and the fault is not stale."""
    slot = fault.slot
    assert slot is not None
    sptes = vcpu.kvm.second_stage.sptes
    spte = slot.hva_of_gfn(fault.gfn) | PT_READ
    if fault.map_writable and (fault.write or not slot.dirty_bitmap):
        # With a dirty log, a page becomes writable only by the write that is then logged.
        spte |= PT_WRITABLE
    if fault.write:
        slot.mark_page_dirty(fault.gfn)
    old = sptes.get(fault.gfn, 0)
    if old | spte == old:
        return _SPURIOUS
    sptes[fault.gfn] = old | spte
    return _FIXED
