"""One list of slots after another: ``kvm_set_memslot`` and what it calls, of virt/kvm/kvm_main.c.

A slot that is deleted or moved must not be used while its entries are being zapped, nor may its
frames pass for MMIO before they have been.  So the kernel publishes it three times over: first the
same slot marked ``KVM_MEMSLOT_INVALID``, on which page faults are retried; then come the zap and
the flush of the TLBs; then the list without it, or with it in its new place.

No list is published while the host is taking pages away (``mn_active_invalidate_count``): KVM
counts what is in flight by the slots that a range is in, and must find the same ones at its end.
The other way round nobody waits: an invalidation takes no lock that a change of slots holds.

After each list is published, :mod:`guestfault.softkvm.srcu` has everybody waited for who may still
use a slot of an older one: what comes next, be it the zap or userspace that unmaps the memory,
meets no fault in flight that found the slot.  One that found *no* slot may still leave an entry
that says so, and that has the generation of the list that it read.
"""

from __future__ import annotations

from dataclasses import replace

from guestfault.softkvm.kvm_host import Kvm, kvm_flush_remote_tlbs
from guestfault.softkvm.memslots import KVM_MEMSLOT_INVALID, KvmMemorySlot
from guestfault.softkvm.page_track import kvm_page_track_flush_slot
from guestfault.softkvm.preempt import wait
from guestfault.softkvm.srcu import synchronize_srcu
from guestfault.uapi import kvm as uapi

__all__ = ["kvm_set_memslot"]


def kvm_set_memslot(kvm: Kvm, old: KvmMemorySlot | None, new: KvmMemorySlot | None) -> None:
    """Put ``new`` in the place of ``old``; either may be ``None``.  ``slots_lock`` is held."""
    if old is not None and (new is None or new.base_gfn != old.base_gfn):
        old = kvm_invalidate_memslot(kvm, old)
        kvm_swap_active_memslots(kvm, old, new)
        return
    kvm_swap_active_memslots(kvm, old, new)
    if old is not None and new is not None:
        kvm_mmu_slot_apply_flags(kvm, old, new)


def kvm_invalidate_memslot(kvm: Kvm, old: KvmMemorySlot) -> KvmMemorySlot:
    """Publish the slot as invalid and take back every entry in it; the slot as published."""
    invalid = replace(old, flags=old.flags | KVM_MEMSLOT_INVALID)
    kvm_swap_active_memslots(kvm, old, invalid)
    kvm_arch_flush_shadow_memslot(kvm, old)
    return invalid


def kvm_swap_active_memslots(
    kvm: Kvm, old: KvmMemorySlot | None, new: KvmMemorySlot | None
) -> None:
    """Publish the next list; when it returns, nobody uses the one before.

    An invalidation that has begun must end on the slots that it began with.
    """
    memslots, published = kvm.memslots.replaced(old, new), False
    while not published:
        wait("kvm_swap_active_memslots: publish the slots", "memslots", lambda: _are_free(kvm))
        with kvm.mn_invalidate_lock:
            if _are_free(kvm):
                kvm.memslots, published = memslots, True
    synchronize_srcu(kvm)


def _are_free(kvm: Kvm) -> bool:
    return not kvm.mn_active_invalidate_count


def kvm_arch_flush_shadow_memslot(kvm: Kvm, slot: KvmMemorySlot) -> None:
    """Zap the slot; when it returns, no vCPU can touch what is in it."""
    flush = kvm.second_stage.zap_memslot(slot)
    kvm_page_track_flush_slot(kvm, slot)
    if flush:
        kvm_flush_remote_tlbs(kvm)


def kvm_mmu_slot_apply_flags(kvm: Kvm, old: KvmMemorySlot, new: KvmMemorySlot) -> None:
    """A slot has changed its flags where it is, and the new list is published."""
    added = new.flags & ~old.flags
    if added & kvm.userfault_flag:
        # What is mapped would never be asked for again, whatever the bitmap says.
        if kvm.second_stage.zap_memslot(new):
            kvm_flush_remote_tlbs(kvm)
    elif added & uapi.KVM_MEM_LOG_DIRTY_PAGES and kvm.second_stage.remove_write_access(new):
        kvm_flush_remote_tlbs(kvm)
