"""What the parts of the fault path hand each other: ``arch/x86/kvm/mmu/mmu_internal.h``."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from guestfault.softkvm.memslots import KvmMemorySlot
from guestfault.softkvm.pfn import KVM_PFN_NOSLOT
from guestfault.x86.registers import PFERR_FETCH_MASK, PFERR_PRIVATE_ACCESS

__all__ = ["KvmPageFault", "RetPf"]


class RetPf(enum.IntEnum):
    """``RET_PF_*``: all >= 0, so -errno fits beside them.  The numbers are those of Linux 6.2.

    7.3 has ``WRITE_PROTECTED`` as 3 and the last three one higher.  It says so of a frame that page
    tracking protects, where 6.2 says ``EMULATE`` (as it does of one that is no memory) and leaves
    it to the emulator to find out that the page could be released instead.
    """

    CONTINUE = 0  # so far so good
    RETRY = 1  # something changed meanwhile: let the guest try again
    EMULATE = 2  # the access must not be made by the guest: KVM performs the instruction
    INVALID = 3  # this is not the way to handle it; never the end of a fault
    FIXED = 4  # the entry is there now
    SPURIOUS = 5  # it was there already


@dataclass(slots=True)
class KvmPageFault:
    """``struct kvm_page_fault``: one access on its way through the fault path."""

    addr: int
    """A guest physical address under two-dimensional paging; under shadow paging a linear one."""
    error_code: int
    prefetch: bool
    gfn: int
    write: bool
    slot: KvmMemorySlot | None = None
    generation: int = 0
    """Of the list of slots in which ``slot`` was looked for."""
    mmu_seq: int = 0
    pfn: int = KVM_PFN_NOSLOT
    map_writable: bool = False
    atomic: bool = False
    """Whether the page was not to be waited for, because userspace wants to be told."""

    @property
    def exec(self) -> bool:
        """Whether it is an instruction fetch."""
        return self.error_code & PFERR_FETCH_MASK != 0

    @property
    def is_private(self) -> bool:
        """Whether the access wants private memory."""
        return self.error_code & PFERR_PRIVATE_ACCESS != 0

    @property
    def hva(self) -> int:
        """The host address behind the frame; there must be a slot."""
        assert self.slot is not None
        return self.slot.hva_of_gfn(self.gfn)
