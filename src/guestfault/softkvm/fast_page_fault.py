"""Giving back the right to write without taking ``mmu_lock``: ``fast_page_fault`` in mmu.c.

A dirty log costs a fault for each page and round: the page is there and was write-protected only to
learn of the next write.  Nothing has to be looked up for that, so KVM changes the entry with a
compare-and-exchange.  If the entry is not any more what it was when it was read, somebody was
faster, and it looks again; four times it may lose before it takes the long way.

The exchange comes first and the mark in the log after.  In between, somebody may take the log: they
get it without this page, and the page is in the next one.  No write is lost, for the guest has not
made it yet; it makes it when this fault is over.

KVM's other use for it is entries that were made not present to see whether they are used (access
tracking).  There are none here: see :mod:`guestfault.softkvm.second_stage`.
"""

from __future__ import annotations

from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.mmu_internal import KvmPageFault, RetPf
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.second_stage import (
    PT_READ,
    PT_WRITABLE,
    SPTE_HOST_WRITABLE,
    SPTE_MMU_WRITABLE,
)
from guestfault.x86.registers import PFERR_PRESENT_MASK, PFERR_RSVD_MASK

__all__ = ["fast_page_fault"]

_MMU = "mmu"
_MAY_BE_WRITABLE = SPTE_HOST_WRITABLE | SPTE_MMU_WRITABLE
_TRIES = 4


def page_fault_can_be_fast(fault: KvmPageFault) -> bool:
    """Whether it is a write to a page that was there when the processor looked."""
    code = fault.error_code
    return fault.write and code & (PFERR_PRESENT_MASK | PFERR_RSVD_MASK) == PFERR_PRESENT_MASK


def fast_page_fault(vcpu: KvmVcpu, fault: KvmPageFault) -> RetPf:
    """FIXED, SPURIOUS if there is nothing to fix, or INVALID: the fault is not one for this."""
    if not page_fault_can_be_fast(fault):
        return RetPf.INVALID
    sptes = vcpu.kvm.second_stage.sptes
    for _ in range(_TRIES):
        preemption_point("fast_page_fault: read the SPTE", _MMU)
        spte = sptes.get(fault.gfn, 0)
        if not spte & PT_READ:
            return RetPf.INVALID
        if spte & PT_WRITABLE:
            return RetPf.SPURIOUS
        if spte & _MAY_BE_WRITABLE != _MAY_BE_WRITABLE:
            return RetPf.INVALID
        if fast_pf_fix_direct_spte(vcpu, fault, spte, spte | PT_WRITABLE):
            vcpu.stat.pf_fast += 1
            return RetPf.FIXED
    return RetPf.INVALID


def fast_pf_fix_direct_spte(vcpu: KvmVcpu, fault: KvmPageFault, old: int, new: int) -> bool:
    """Exchange the entry and log the page; ``False`` if somebody else has changed the entry."""
    preemption_point("fast_pf_fix_direct_spte: cmpxchg the SPTE", _MMU, True)
    if not vcpu.kvm.second_stage.cmpxchg(fault.gfn, old, new):
        return False
    # In the log of the slot as it is now: one that began after this fault did has written-protected
    # the entry before it could be read here.
    preemption_point("fast_pf_fix_direct_spte: find the slot", "memslots")
    slot = vcpu.kvm.memslots.gfn_to_memslot(fault.gfn)
    if slot is not None:
        preemption_point("mark_page_dirty_in_slot: set the bit", _MMU, True)
        slot.mark_page_dirty(fault.gfn)
    return True
