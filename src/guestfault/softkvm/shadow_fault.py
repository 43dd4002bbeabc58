"""Which handler a fault goes to under shadow paging, and the one of a guest without paging.

``kvm_init_shadow_mmu`` sets a function pointer (``mmu->page_fault``) by the guest's CR0.PG; here it
is :func:`shadow_page_fault` that looks, for every vCPU of a VM without two-dimensional paging.
"""

from __future__ import annotations

from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.mmu import is_page_fault_stale, kvm_faultin_pfn
from guestfault.softkvm.mmu_internal import KvmPageFault, RetPf
from guestfault.softkvm.paging_tmpl import page_fault
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.shadow import (
    begin_flush,
    finish_flush,
    make_mmu_pages_available,
    mmu_set_spte,
    shadow_child,
    shadow_table,
)
from guestfault.softkvm.shadow_context import kvm_init_mmu
from guestfault.softkvm.shadow_page import ACC_ALL, KvmMmu, spte_index

__all__ = ["kvm_mmu_create", "shadow_page_fault"]

_MMU, _MEMSLOTS = "mmu", "memslots"


def kvm_mmu_create(vcpu: KvmVcpu) -> None:
    """Give a new vCPU shadow paging."""
    vcpu.mmu = KvmMmu()
    vcpu.mmu_page_fault = shadow_page_fault


def shadow_page_fault(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """``mmu->page_fault``."""
    if kvm_init_mmu(vcpu).root_role.direct:
        return nonpaging_page_fault(vcpu, fault)
    return page_fault(vcpu, fault)


def nonpaging_page_fault(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """A guest without paging: the address is a guest physical one.

    ``direct_page_fault`` again, but for where the entry goes.  No frame is a page table's, unless
    another vCPU has paging on.
    """
    assert vcpu.mmu is not None
    vcpu.mmu.fault_gpa = fault.addr
    stage = vcpu.kvm.second_stage
    preemption_point("direct_page_fault: read mmu_invalidate_seq", _MMU)
    fault.mmu_seq = stage.mmu_invalidate_seq
    preemption_point("direct_page_fault: find the slot", _MEMSLOTS)
    memslots = vcpu.kvm.memslots
    fault.slot, fault.generation = memslots.gfn_to_memslot(fault.gfn), memslots.generation
    r = kvm_faultin_pfn(vcpu, fault)
    if r != RetPf.CONTINUE:
        return r
    preemption_point("direct_page_fault: take mmu_lock", _MMU, True)
    with stage.mmu_lock:
        if is_page_fault_stale(vcpu, fault):
            return RetPf.RETRY
        r = make_mmu_pages_available(vcpu.kvm)
        if r == 0:
            r = direct_map(vcpu, fault)
        flush = begin_flush(shadow_table(vcpu.kvm))
    finish_flush(vcpu.kvm, flush)
    return r


def direct_map(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """``__direct_map``: pages down to the last level, and the entry.  ``mmu_lock`` is held."""
    mmu = vcpu.mmu
    assert mmu is not None
    sp = mmu.root_of(fault.addr)
    while sp is not None and sp.role.level > 1:
        level = sp.role.level
        first_gfn = fault.gfn & -(1 << (level - 1) * 9)
        index = spte_index(fault.addr, level)
        sp = shadow_child(vcpu, sp, index, first_gfn, direct=True, access=ACC_ALL)
    assert sp is not None
    return mmu_set_spte(vcpu, sp, spte_index(fault.addr, 1), ACC_ALL, fault.gfn, fault)
