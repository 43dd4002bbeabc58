"""The second-stage table: which guest frames the vCPUs may touch, and how that is taken back.

One dictionary per VM, gfn -> entry: the host page's address, and rights in its low bits.  An entry
is there only after :func:`~guestfault.softkvm.mmu.kvm_mmu_do_page_fault` has put it there, and goes
when the host's mapping changes: the kernel hears of that from its mmu_notifiers, we from
:mod:`guestfault.linux.mmu_notifier`.  Between an invalidation's start and its end no fault may
install anything, and one that began before must look again.
"""

from __future__ import annotations

import threading

from guestfault.softkvm.memslots import PAGE_SIZE, KvmMemorySlot, Memslots
from guestfault.softkvm.preempt import preemption_point

__all__ = ["PAGE_SIZE", "PT_READ", "PT_WRITABLE", "SecondStage"]

PT_READ = 1
PT_WRITABLE = 2


class SecondStage:
    """The VM's second-stage table and the lock and sequence that protect it."""

    def __init__(self) -> None:
        self.mmu_lock = threading.Lock()
        self.mmu_invalidate_seq = 0
        self.mmu_invalidate_in_progress = 0
        self.sptes: dict[int, int] = {}

    def mmu_invalidate_retry(self, mmu_seq: int) -> bool:
        """Whether what was found out at ``mmu_seq`` may no longer hold.  ``mmu_lock`` is held."""
        return self.mmu_invalidate_in_progress > 0 or self.mmu_invalidate_seq != mmu_seq

    def invalidate_range_start(self, memslots: Memslots, start: int, end: int) -> bool:
        """Zap what maps the host range and hold faults off; whether there was anything to zap."""
        preemption_point("invalidate_range_start: take mmu_lock", "mmu", True)
        with self.mmu_lock:
            self.mmu_invalidate_in_progress += 1
            zapped = [self._zap_slot(slot, start, end) for slot in memslots.slots]
            return any(zapped)

    def invalidate_range_end(self) -> None:
        """Let faults install entries again; those in flight see a new sequence and retry."""
        preemption_point("invalidate_range_end: take mmu_lock", "mmu", True)
        with self.mmu_lock:
            self.mmu_invalidate_seq += 1
            self.mmu_invalidate_in_progress -= 1

    def zap_memslot(self, slot: KvmMemorySlot) -> None:
        """Drop every entry of a slot that is going, moving or changing its flags."""
        preemption_point("zap_memslot: take mmu_lock", "mmu", True)
        with self.mmu_lock:
            self.mmu_invalidate_seq += 1
            first = slot.userspace_addr
            self._zap_slot(slot, first, first + slot.npages * PAGE_SIZE)

    def _zap_slot(self, slot: KvmMemorySlot, start: int, end: int) -> bool:
        first = max(0, start - slot.userspace_addr) // PAGE_SIZE
        last = min(slot.npages, (end - slot.userspace_addr + PAGE_SIZE - 1) // PAGE_SIZE)
        gfns = range(slot.base_gfn + first, slot.base_gfn + last)
        if len(gfns) > len(self.sptes):
            found = [gfn for gfn in self.sptes if gfn in gfns]
        else:
            found = [gfn for gfn in gfns if gfn in self.sptes]
        for gfn in found:
            del self.sptes[gfn]
        return bool(found)
