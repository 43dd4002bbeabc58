"""What the parts of the fault path hand each other: ``arch/x86/kvm/mmu/mmu_internal.h``."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from guestfault.softkvm.memslots import KvmMemorySlot
from guestfault.softkvm.pfn import KVM_PFN_NOSLOT

__all__ = ["KvmPageFault", "RetPf"]


class RetPf(enum.IntEnum):
    """``RET_PF_*`` of arch/x86/kvm/mmu/mmu_internal.h: all >= 0, so -errno fits beside them."""

    CONTINUE = 0
    RETRY = 1
    EMULATE = 2
    INVALID = 3
    FIXED = 4
    SPURIOUS = 5


@dataclass(slots=True)
class KvmPageFault:
    """``struct kvm_page_fault``: one access on its way through the fault path."""

    addr: int
    error_code: int
    prefetch: bool
    gfn: int
    write: bool
    slot: KvmMemorySlot | None = None
    mmu_seq: int = 0
    pfn: int = KVM_PFN_NOSLOT
    map_writable: bool = False
