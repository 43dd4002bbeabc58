"""Frames whose every write KVM must see: ``arch/x86/kvm/mmu/page_track.c``.

Shadow paging keeps copies of the guest's page tables, and the copies are right only as long as KVM
hears of each write to the originals.  Such a frame is *write-tracked*: no second-stage entry lets
the guest write it, the fault that a write makes is therefore one of a page that is present
(``page_fault_handle_page_track``), KVM carries the write out itself, and
:func:`kvm_page_track_write` tells everybody who has registered.

Frames are counted in their slot, so several may track one, and a slot that goes takes its counts
with it.  Two things keep the guest from writing a tracked frame, and both are needed: entries that
are there lose their right to write when tracking begins, for good and not only until the next
:mod:`~guestfault.softkvm.fast_page_fault` (``spte_write_protect`` with ``pt_protect``), and
entries that are made later ask :func:`kvm_slot_page_track_is_active`.
"""

from __future__ import annotations

from guestfault.softkvm.kvm_host import Kvm, KvmVcpu, PageTrackNotifier
from guestfault.softkvm.memslots import KvmMemorySlot

__all__ = [
    "kvm_page_track_flush_slot",
    "kvm_page_track_register_notifier",
    "kvm_page_track_unregister_notifier",
    "kvm_page_track_write",
    "kvm_slot_page_track_add_page",
    "kvm_slot_page_track_is_active",
    "kvm_slot_page_track_remove_page",
]


def kvm_slot_page_track_add_page(kvm: Kvm, slot: KvmMemorySlot, gfn: int) -> bool:
    """Track writes to a frame of the slot.  ``mmu_lock`` is held.

    Whether an entry has lost its right to write: then the caller must have the TLBs flushed once it
    has let go of the lock (:func:`~guestfault.softkvm.kvm_host.kvm_flush_remote_tlbs`).
    """
    slot.gfn_write_track[gfn] = slot.gfn_write_track.get(gfn, 0) + 1
    return kvm.second_stage.write_protect_gfn(gfn)


def kvm_slot_page_track_remove_page(slot: KvmMemorySlot, gfn: int) -> None:
    """Undo one :func:`kvm_slot_page_track_add_page`.  ``mmu_lock`` is held.

    Nothing is made writable: the next write faults, and finds that it may be.
    """
    count = slot.gfn_write_track.get(gfn, 0)
    if count > 1:
        slot.gfn_write_track[gfn] = count - 1
    elif count:
        del slot.gfn_write_track[gfn]


def kvm_slot_page_track_is_active(slot: KvmMemorySlot | None, gfn: int) -> bool:
    """Whether writes to the frame are tracked."""
    return slot is not None and gfn in slot.gfn_write_track


def kvm_page_track_register_notifier(kvm: Kvm, notifier: PageTrackNotifier) -> None:
    """Call it from now on."""
    kvm.track_notifiers.append(notifier)


def kvm_page_track_unregister_notifier(kvm: Kvm, notifier: PageTrackNotifier) -> None:
    """Call it no more."""
    kvm.track_notifiers.remove(notifier)


def kvm_page_track_write(vcpu: KvmVcpu, gpa: int, data: bytes) -> None:
    """KVM has written ``data`` to guest memory on the guest's behalf.

    Called after every write of the emulator, tracked frame or not, as the kernel calls it: who
    listens knows which frames are its own.
    """
    for notifier in vcpu.kvm.track_notifiers:
        notifier.track_write(vcpu, gpa, data)


def kvm_page_track_flush_slot(kvm: Kvm, slot: KvmMemorySlot) -> None:
    """The slot is going or moving."""
    for notifier in kvm.track_notifiers:
        notifier.track_flush_slot(slot)
