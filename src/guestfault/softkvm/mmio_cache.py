"""What is known to be no memory: MMIO caching, from the first access of a device to the next.

The first access to a frame that no slot holds takes the whole way of a fault, only to find nothing.
What it leaves is an entry that says so (:func:`~guestfault.softkvm.second_stage.make_mmio_spte`)
with a reserved bit set: the processor's next access there faults with PFERR_RSVD, which nothing
else does, and goes to the emulator at once.  The vCPU remembers the frame that it met last besides
(``vcpu->arch.mmio_gfn``), and does not even look at the table.

Nobody goes about removing all this when a slot is added.  Entry and memory both carry the
generation of the slots in which there was none; with another it is void, and the fault is handled
as if it were the first.  ``Kvm.enable_mmio_caching`` is the parameter of the module kvm.
"""

from __future__ import annotations

from guestfault.softkvm.kvm_host import KvmVcpu, MmioInfo
from guestfault.softkvm.mmu_internal import RetPf
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.second_stage import PAGE_SIZE, is_mmio_spte, mmio_spte_generation

__all__ = ["handle_mmio_page_fault", "mmio_info_in_cache", "vcpu_cache_mmio_info"]

_PAGE = -PAGE_SIZE


def handle_mmio_page_fault(vcpu: KvmVcpu, addr: int) -> RetPf:
    """A fault on an entry that says "no memory": EMULATE if it still holds.

    INVALID if the slots have changed since, and RETRY if the entry has gone meanwhile.
    """
    preemption_point("handle_mmio_page_fault: read the slots' generation", "memslots")
    generation = vcpu.kvm.memslots.generation
    if mmio_info_in_cache(vcpu, addr, generation):
        return RetPf.EMULATE
    preemption_point("handle_mmio_page_fault: read the SPTE", "mmu")
    gva, gfn, mmu = 0, addr >> 12, vcpu.mmu
    if mmu is None:
        spte = vcpu.kvm.second_stage.sptes.get(gfn, 0)
    else:
        gva, (spte, gfn) = addr, mmu.look_up(addr)
    if not is_mmio_spte(spte):
        return RetPf.RETRY
    if mmio_spte_generation(spte) != generation:
        return RetPf.INVALID
    vcpu_cache_mmio_info(vcpu, gva, gfn, generation)
    return RetPf.EMULATE


def mmio_info_in_cache(vcpu: KvmVcpu, addr: int, generation: int) -> bool:
    """Whether the vCPU remembers that there is no memory at ``addr``.  Frame 0 it never does."""
    cached = vcpu.mmio
    if cached is None or cached.generation != generation:
        return False
    if vcpu.kvm.tdp_enabled:
        return cached.gfn != 0 and cached.gfn == addr >> 12
    return cached.gva != 0 and cached.gva == addr & _PAGE


def vcpu_cache_mmio_info(vcpu: KvmVcpu, gva: int, gfn: int, generation: int) -> None:
    """Remember it; ``gva`` is 0 under two-dimensional paging."""
    vcpu.mmio = MmioInfo(gva & _PAGE, gfn, generation)
