"""A few bytes of guest memory that KVM itself reads and writes often: ``struct gfn_to_hva_cache``.

The host address is found out once and kept as long as the memory slots stay what they are.  The
access is a plain copy to or from userspace memory: it may sleep, and where it fails the caller
hears -EFAULT and nobody else does; no second-stage entry is involved.
"""

from __future__ import annotations

import errno
from dataclasses import dataclass

from guestfault.softkvm.memslots import PAGE_SIZE, KvmMemorySlot, Memslots
from guestfault.softkvm.mm import Mm
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.second_stage import SecondStage
from guestfault.uapi import kvm as uapi

__all__ = [
    "GfnToHvaCache",
    "kvm_gfn_to_hva_cache_init",
    "kvm_read_guest_offset_cached",
    "kvm_write_guest_offset_cached",
]

_MEMSLOTS, _PAGE = "memslots", -PAGE_SIZE


@dataclass(slots=True)
class GfnToHvaCache:
    """``size`` bytes at ``gpa``, inside one page, as ``memslots`` had them."""

    gpa: int
    size: int
    memslots: Memslots
    slot: KvmMemorySlot | None

    @property
    def hva(self) -> int:
        """The host address of the first byte; there is a slot."""
        assert self.slot is not None
        return self.slot.hva_of_gfn(self.gpa // PAGE_SIZE) + self.gpa % PAGE_SIZE


def kvm_gfn_to_hva_cache_init(memslots: Memslots, gpa: int, size: int) -> GfnToHvaCache | None:
    """Look the bytes up; ``None`` where no writable slot is, or where they span two pages."""
    slot = _writable_slot(memslots, gpa)
    if slot is None or gpa % PAGE_SIZE + size > PAGE_SIZE:
        return None
    return GfnToHvaCache(gpa, size, memslots, slot)


def _writable_slot(memslots: Memslots, gpa: int) -> KvmMemorySlot | None:
    # __gfn_to_hva_many() with write: the cache serves both ways.
    slot = memslots.gfn_to_memslot(gpa // PAGE_SIZE)
    return None if slot is None or slot.flags & uapi.KVM_MEM_READONLY else slot


def _refresh(cache: GfnToHvaCache, memslots: Memslots) -> bool:
    """Look the bytes up again if the slots have changed; whether there are any."""
    if cache.memslots is not memslots:
        cache.memslots = memslots
        cache.slot = _writable_slot(memslots, cache.gpa)
    return cache.slot is not None


def kvm_write_guest_offset_cached(
    cache: GfnToHvaCache, data: bytes, offset: int, memslots: Memslots, mm: Mm, stage: SecondStage
) -> int:
    """Write them, from ``offset`` on: 0 or -EFAULT."""
    assert offset + len(data) <= cache.size
    preemption_point("kvm_write_guest_offset_cached: find the slot", _MEMSLOTS)
    if not _refresh(cache, memslots):
        return -errno.EFAULT
    slot = cache.slot
    assert slot is not None
    hva = cache.hva + offset
    preemption_point("kvm_write_guest_offset_cached: copy_to_user", ("page", hva & _PAGE), True)
    if not mm.copy_to_user(hva, data):
        return -errno.EFAULT
    if slot.dirty_bitmap:
        preemption_point("mark_page_dirty_in_slot", "mmu", True)
        with stage.mmu_lock:
            slot.mark_page_dirty(cache.gpa // PAGE_SIZE)
    return 0


def kvm_read_guest_offset_cached(
    cache: GfnToHvaCache, offset: int, size: int, memslots: Memslots, mm: Mm
) -> bytes | None:
    """Read ``size`` of them from ``offset`` on; ``None`` for -EFAULT."""
    assert offset + size <= cache.size
    preemption_point("kvm_read_guest_offset_cached: find the slot", _MEMSLOTS)
    if not _refresh(cache, memslots):
        return None
    hva = cache.hva + offset
    preemption_point("kvm_read_guest_offset_cached: copy_from_user", ("page", hva & _PAGE))
    return mm.copy_from_user(hva, size)
