"""Memory slots as KVM keeps and checks them: ``__kvm_set_memory_region`` in virt/kvm/kvm_main.c.

Slots are replaced as a whole list and never changed in place, as the kernel replaces its memslots
under RCU: a vCPU in the middle of a fault keeps the list it began with and notices by
``generation``.  How the lists follow each other is :mod:`guestfault.softkvm.set_memslot`.
"""

from __future__ import annotations

import errno
from bisect import bisect_right
from dataclasses import dataclass, field

from guestfault.softkvm.gmem import GmemBinding
from guestfault.uapi import kvm as uapi

__all__ = [
    "KVM_MEMSLOT_INVALID",
    "KVM_USER_MEM_SLOTS",
    "PAGE_SIZE",
    "KvmMemorySlot",
    "Memslots",
    "kvm_set_memory_region",
]

KVM_MEMSLOT_INVALID = 1 << 16  # a flag of KVM's own: the slot is being deleted or moved
KVM_USER_MEM_SLOTS = 32764  # what x86 reports for KVM_CAP_NR_MEMSLOTS since 5.12
_MAX_PAGES = 1 << 31  # KVM_MEM_MAX_NR_PAGES + 1
_TASK_SIZE_MAX = (1 << 47) - 4096
PAGE_SIZE = 4096


@dataclass(slots=True)
class KvmMemorySlot:
    """One slot: ``npages`` frames from ``base_gfn``, backed from ``userspace_addr`` on."""

    id: int
    base_gfn: int
    npages: int
    userspace_addr: int
    flags: int
    dirty_bitmap: bytearray = field(default_factory=bytearray)
    userfault_bitmap: int = 0
    """Where userspace keeps a bit for each frame that it has yet to provide (KVM Userfault)."""
    gfn_write_track: dict[int, int] = field(default_factory=dict)
    """How many want to know of writes to a frame; see :mod:`guestfault.softkvm.page_track`."""
    gmem: GmemBinding | None = None
    """The guest_memfd that it was made with (``KVM_MEM_GUEST_MEMFD``)."""
    gmem_only: bool = False
    """Whether that serves shared faults, too (``KVM_MEMSLOT_GMEM_ONLY``)."""

    def hva_of_gfn(self, gfn: int) -> int:
        """The host address that backs a frame of this slot."""
        return self.userspace_addr + (gfn - self.base_gfn) * PAGE_SIZE

    def mark_page_dirty(self, gfn: int) -> None:
        """Set the frame's bit in the dirty log, if the slot keeps one."""
        if self.dirty_bitmap:
            bit = gfn - self.base_gfn
            self.dirty_bitmap[bit >> 3] |= 1 << (bit & 7)


@dataclass(frozen=True, slots=True)
class Memslots:
    """The slots of a VM at one generation, ordered by guest frame number."""

    generation: int = 0
    slots: tuple[KvmMemorySlot, ...] = ()
    _bases: tuple[int, ...] = ()

    def gfn_to_memslot(self, gfn: int) -> KvmMemorySlot | None:
        """The slot that holds a frame, or ``None``: an access there is MMIO."""
        i = bisect_right(self._bases, gfn) - 1
        if i >= 0:
            slot = self.slots[i]
            if gfn < slot.base_gfn + slot.npages:
                return slot
        return None

    def by_id(self, slot_id: int) -> KvmMemorySlot | None:
        """The slot that userspace created under this number."""
        return next((s for s in self.slots if s.id == slot_id), None)

    def replaced(self, old: KvmMemorySlot | None, new: KvmMemorySlot | None) -> Memslots:
        """The next generation, without ``old`` and with ``new``."""
        kept = [s for s in self.slots if s is not old] + ([new] if new else [])
        kept.sort(key=lambda s: s.base_gfn)
        return Memslots(self.generation + 1, tuple(kept), tuple(s.base_gfn for s in kept))


def access_ok(addr: int, size: int) -> bool:
    """Whether a range is in userspace.  Nothing need be mapped there."""
    return addr >= 0 and addr + size <= _TASK_SIZE_MAX


def kvm_set_memory_region(
    memslots: Memslots,
    mem: uapi.kvm_userspace_memory_region,
    valid_flags: int,
    userfault_flag: int = 0,
    userfault_bitmap: int = 0,
    gmem_flag: int = 0,
) -> tuple[int, KvmMemorySlot | None, KvmMemorySlot | None]:
    """Check a request as the kernel does: ``(0 or -errno, slot to remove, slot to add)``.

    A request that changes nothing removes and adds nothing.  ``userfault_bitmap`` is the address
    that comes with ``userfault_flag`` among the flags: a bit for each page, in whole 64-bit words.
    What is there is not looked at before a fault.  ``gmem_flag`` says of a slot that it has a
    guest_memfd, which is still to be bound.
    """
    bad = -errno.EINVAL, None, None
    if mem.flags & ~valid_flags:
        return bad
    if (mem.memory_size | mem.guest_phys_addr | mem.userspace_addr) & (PAGE_SIZE - 1):
        return bad
    if mem.guest_phys_addr + mem.memory_size >= 1 << 64 or mem.memory_size >> 12 >= _MAX_PAGES:
        return bad
    if not access_ok(mem.userspace_addr, mem.memory_size) or mem.slot >= KVM_USER_MEM_SLOTS:
        return bad
    userfault = mem.flags & userfault_flag
    words = -(-(mem.memory_size >> 12) // 64)
    if userfault and not access_ok(userfault_bitmap, words * 8):
        return bad
    old = memslots.by_id(mem.slot)
    base_gfn, npages = mem.guest_phys_addr >> 12, mem.memory_size >> 12
    if npages == 0:
        return (0, old, None) if old else bad
    if old:
        # A slot with a guest_memfd can be deleted, and nothing else.  (6.8 looks at the new flags
        # only, and so lets such a slot lose its own.)
        if (old.flags | mem.flags) & gmem_flag:
            return bad
        # An existing slot can move or change its flags; its size and backing cannot change.
        if old.userspace_addr != mem.userspace_addr or old.npages != npages:
            return bad
        if (old.flags ^ mem.flags) & uapi.KVM_MEM_READONLY:
            return bad
        if old.base_gfn == base_gfn and old.flags == mem.flags:
            return 0, None, None
    for other in memslots.slots:
        if other is not old and (
            base_gfn < other.base_gfn + other.npages and other.base_gfn < base_gfn + npages
        ):
            return -errno.EEXIST, None, None
    new = KvmMemorySlot(mem.slot, base_gfn, npages, mem.userspace_addr, mem.flags)
    if mem.flags & uapi.KVM_MEM_LOG_DIRTY_PAGES:
        keep = old.dirty_bitmap if old else None
        new.dirty_bitmap = keep or bytearray((npages + 63) // 64 * 8)
    if old and old.base_gfn == base_gfn:
        new.gfn_write_track = old.gfn_write_track
    if userfault:
        new.userfault_bitmap = userfault_bitmap
    return 0, old, new
