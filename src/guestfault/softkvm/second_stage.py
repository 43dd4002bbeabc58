"""The second-stage table: which guest frames the vCPUs may touch, and how that is taken back.

One dictionary per VM, gfn -> entry (SPTE).  An entry is there only after
:func:`~guestfault.softkvm.mmu.kvm_mmu_do_page_fault` has put it there, and goes when the host's
mapping changes: the kernel hears of that from its mmu_notifiers, we from
:mod:`guestfault.linux.mmu_notifier`.  Between an invalidation's start and its end no fault may
install anything, and one that began before must look again.

An entry is the host page's address with bits of ``arch/x86/kvm/mmu/spte.h`` below it: what the
guest may do now (``PT_READ``, ``PT_WRITABLE``), and what it may be allowed without looking the page
up again.  ``SPTE_HOST_WRITABLE``: the host's page is mapped writable.  ``SPTE_MMU_WRITABLE``: KVM
itself has no objection.  A page is write-protected for the dirty log by taking away ``PT_WRITABLE``
only, so that :mod:`~guestfault.softkvm.fast_page_fault` can give it back; for page tracking
``SPTE_MMU_WRITABLE`` goes with it.  There are no accessed bits: as with EPT and NPT that keep them
in hardware, nothing is ever marked not present in order to see whether it is used.

An *MMIO entry* says that a frame is no memory: ``SPTE_MMIO``, no right, and in the address's place
the number of the slot list (its generation) in which no slot was found.  It spares the next access
the search.  A new slot does not remove it; it is stale by its generation.

Where memory can be private, ``SPTE_PRIVATE`` says which of a frame's two pages it is; the kernel
knows by the page.

``mmu_lock`` is held to change the table, but for the one exchange of the fast page fault.
"""

from __future__ import annotations

import threading

from guestfault.softkvm.memslots import PAGE_SIZE, KvmMemorySlot, Memslots
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.shadow_page import ShadowTable

__all__ = [
    "PAGE_SIZE",
    "PT_READ",
    "PT_WRITABLE",
    "SPTE_HOST_WRITABLE",
    "SPTE_MMIO",
    "SPTE_MMU_WRITABLE",
    "SPTE_PRIVATE",
    "SecondStage",
    "is_mmio_spte",
    "make_mmio_spte",
    "mmio_spte_generation",
]

PT_READ = 1
PT_WRITABLE = 2
SPTE_HOST_WRITABLE = 4
SPTE_MMU_WRITABLE = 8
SPTE_MMIO = 16
SPTE_PRIVATE = 32

_MMU = "mmu"


def make_mmio_spte(generation: int) -> int:
    """The entry of a frame that no slot of this generation holds."""
    return generation * PAGE_SIZE | SPTE_MMIO


def is_mmio_spte(spte: int) -> bool:
    """Whether it is one of those."""
    return spte & SPTE_MMIO != 0


def mmio_spte_generation(spte: int) -> int:
    """The generation it was made with."""
    return spte // PAGE_SIZE


class SecondStage:
    """The VM's second-stage table and the lock and sequence that protect it.

    Where KVM keeps shadow page tables the entries are in ``shadow``: what is taken away is taken
    from both.
    """

    def __init__(self) -> None:
        self.mmu_lock = threading.Lock()
        self.mmu_invalidate_seq = 0
        self.mmu_invalidate_in_progress = 0
        self._invalidated = 0, 0  # host addresses; while in progress, what all of them are in
        self._invalidated_gfns: list[tuple[range, ...]] = []  # the same, by frames
        self.sptes: dict[int, int] = {}
        self.shadow = ShadowTable()
        self.keeps_mmio = False
        """Whether an entry that says "no memory" outlives what is zapped around it.

        The kernel zaps entries that map a page, and a slot that goes takes the others along because
        every root is made obsolete; not so, since 6.12, in a VM of another type than the default
        (``kvm_memslot_flush_zap_all``).  Elsewhere it makes no difference.
        """

    # -- the host takes pages away -----------------------------------------------------------------

    def mmu_invalidate_retry(self, mmu_seq: int, hva: int, gfn: int) -> bool:
        """``mmu_invalidate_retry_hva``: whether to look again at what was found at ``mmu_seq``.

        ``mmu_lock`` is held.
        """
        if self.mmu_invalidate_in_progress:
            start, end = self._invalidated
            if start <= hva < end:
                return True
            if any(gfn in gfns for ranges in self._invalidated_gfns for gfns in ranges):
                return True
        return self.mmu_invalidate_seq != mmu_seq

    def invalidate_range_start(self, memslots: Memslots, start: int, end: int) -> bool:
        """Zap what maps the host range and hold faults off; whether there was anything to zap."""
        preemption_point("invalidate_range_start: take mmu_lock", _MMU, True)
        with self.mmu_lock:
            if self.mmu_invalidate_in_progress > len(self._invalidated_gfns):
                # Of several ranges only the hull is kept: faults between them wait needlessly.
                first, last = self._invalidated
                self._invalidated = min(first, start), max(last, end)
            else:
                self._invalidated = start & -PAGE_SIZE, end
            self.mmu_invalidate_in_progress += 1
            zapped = [self._zap(_gfns(slot, start, end)) for slot in memslots.slots]
            return any(zapped)

    def invalidate_range_end(self) -> None:
        """Let faults install entries again; those in flight see a new sequence and retry."""
        preemption_point("invalidate_range_end: take mmu_lock", _MMU, True)
        with self.mmu_lock:
            self.mmu_invalidate_seq += 1
            self.mmu_invalidate_in_progress -= 1

    def kvm_mmu_invalidate_begin(self, gfns: tuple[range, ...]) -> bool:
        """The same by guest frames: their attributes change, or their file goes."""
        preemption_point("kvm_mmu_invalidate_begin: take mmu_lock", _MMU, True)
        with self.mmu_lock:
            if not self.mmu_invalidate_in_progress:
                self._invalidated = 0, 0
            self.mmu_invalidate_in_progress += 1
            self._invalidated_gfns.append(gfns)
            zapped = [self._zap(some) for some in gfns]
            return any(zapped)

    def kvm_mmu_invalidate_end(self, gfns: tuple[range, ...]) -> None:
        """What was to change about them has changed."""
        preemption_point("kvm_mmu_invalidate_end: take mmu_lock", _MMU, True)
        with self.mmu_lock:
            self.mmu_invalidate_seq += 1
            self.mmu_invalidate_in_progress -= 1
            self._invalidated_gfns.remove(gfns)

    # -- slots change ------------------------------------------------------------------------------

    def zap_memslot(self, slot: KvmMemorySlot) -> bool:
        """Drop every entry of a slot, and have faults in flight look again; whether any was there.

        The kernel comes to the second by making every root obsolete (``kvm_mmu_zap_all_fast``).
        """
        preemption_point("zap_memslot: take mmu_lock", _MMU, True)
        with self.mmu_lock:
            self.mmu_invalidate_seq += 1
            return self._zap(range(slot.base_gfn, slot.base_gfn + slot.npages))

    def remove_write_access(self, slot: KvmMemorySlot) -> bool:
        """``kvm_mmu_slot_remove_write_access``: a dirty log begins; whether to flush TLBs.

        Faults that found the slot without the log, and would make a page writable unlogged, are
        over: they were waited for when the slot with the log was published.
        """
        preemption_point("kvm_mmu_slot_remove_write_access: take mmu_lock", _MMU, True)
        with self.mmu_lock:
            return self._write_protect(range(slot.base_gfn, slot.base_gfn + slot.npages))

    def get_dirty_log(self, slot: KvmMemorySlot) -> tuple[bytes, bool]:
        """``kvm_get_dirty_log_protect``: take the log and write-protect what is in it.

        The log, and whether to flush TLBs.  Until that is done a guest can write to a page that is
        in the log by way of its TLB: the caller reads the pages after the flush.
        """
        preemption_point("kvm_get_dirty_log_protect: take mmu_lock", _MMU, True)
        with self.mmu_lock:
            log = bytes(slot.dirty_bitmap)
            slot.dirty_bitmap[:] = bytes(len(log))
            flush = False
            for at, byte in enumerate(log):
                first = slot.base_gfn + at * 8
                for gfn in range(first, first + byte.bit_length()):
                    if byte >> gfn - first & 1 and self._write_protect(range(gfn, gfn + 1)):
                        flush = True
            return log, flush

    # -- single entries ----------------------------------------------------------------------------

    def write_protect_gfn(self, gfn: int) -> bool:
        """``kvm_mmu_slot_gfn_write_protect``, for page tracking; whether to flush TLBs.

        ``mmu_lock`` is held.
        """
        flush = self._write_protect(range(gfn, gfn + 1))
        spte = self.sptes.get(gfn, 0)
        if spte & SPTE_MMU_WRITABLE:
            # Even if it is not writable: whoever made it so may not have flushed the TLBs yet.
            self.sptes[gfn] = spte & ~SPTE_MMU_WRITABLE
            flush = True
        return flush

    def cmpxchg(self, gfn: int, old: int, new: int) -> bool:
        """Exchange an entry if it is still ``old``, as one step.

        The processor's compare-and-exchange takes no lock; Python has none, so that ``mmu_lock``
        stands in for the processor's.
        """
        with self.mmu_lock:
            if self.sptes.get(gfn) != old:
                return False
            self.sptes[gfn] = new
            return True

    def _write_protect(self, gfns: range) -> bool:
        sptes = self.sptes
        flush = self.shadow.write_protect_gfns(gfns)
        for gfn in self._mapped(gfns):
            spte = sptes[gfn]
            if spte & PT_WRITABLE:
                sptes[gfn] = spte & ~PT_WRITABLE
                flush = True
        return flush

    def _zap(self, gfns: range) -> bool:
        zapped = self.shadow.unmap_gfns(gfns)
        for gfn in self._mapped(gfns):
            if self.keeps_mmio and self.sptes[gfn] & SPTE_MMIO:
                continue
            del self.sptes[gfn]
            zapped = True
        return zapped

    def _mapped(self, gfns: range) -> list[int]:
        if len(gfns) > len(self.sptes):
            return [gfn for gfn in self.sptes if gfn in gfns]
        return [gfn for gfn in gfns if gfn in self.sptes]


def _gfns(slot: KvmMemorySlot, start: int, end: int) -> range:
    """The slot's frames that a host range backs."""
    first = max(0, start - slot.userspace_addr) // PAGE_SIZE
    last = min(slot.npages, (end - slot.userspace_addr + PAGE_SIZE - 1) // PAGE_SIZE)
    return range(slot.base_gfn + first, slot.base_gfn + last)
