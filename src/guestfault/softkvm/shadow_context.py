"""Which shadow pages a vCPU runs on: its roots, and what its registers make of the guest's tables.

``kvm_init_mmu``, ``kvm_mmu_load`` and their neighbours in ``arch/x86/kvm/mmu/mmu.c``, and
``load_pdptrs`` of ``arch/x86/kvm/x86.c``.  A guest that writes CR0, CR3, CR4 or EFER needs other
roots, and so does one whose root was zapped.  Roots are looked up when the next access needs them;
shadow pages stay when nobody has them for a root, and are found again.

A root that lies in no slot shadows nothing: an access through it makes the guest's walk fail, and
so ends as a page fault of the guest, as Linux has it since 6.6 (``kvm_mmu_is_dummy_root``).
"""

from __future__ import annotations

from guestfault.softkvm.kvm_host import Kvm, KvmVcpu
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.shadow import (
    begin_flush,
    finish_flush,
    kvm_mmu_get_shadow_page,
    make_mmu_pages_available,
    shadow_table,
)
from guestfault.softkvm.shadow_page import KvmMmu, KvmMmuPage, Role, hardware_permissions
from guestfault.x86.entries import PT_PRESENT_MASK, PagingMode, level_formats
from guestfault.x86.paging_state import PagingState
from guestfault.x86.registers import CR0_WP, CR4_PSE, CR4_SMAP, CR4_SMEP, EFER_NXE

__all__ = [
    "kvm_init_mmu",
    "kvm_mmu_free_roots",
    "kvm_mmu_invlpg",
    "kvm_mmu_reload",
    "kvm_mmu_zap_gfn",
    "load_pdptrs",
]

_MMU = "mmu"


def kvm_init_mmu(vcpu: KvmVcpu) -> KvmMmu:
    """The vCPU's paging as its registers have it now."""
    mmu = vcpu.mmu
    assert mmu is not None
    paging = vcpu.paging
    if mmu.paging is paging:
        return mmu
    if paging.mode is PagingMode.PAE:
        if mmu.pdptrs_cr3 != paging.cr3:
            load_pdptrs(vcpu, paging.cr3)
        paging = PagingState(
            paging.cr0,
            paging.cr3,
            paging.cr4,
            paging.efer,
            paging.maxphyaddr,
            paging.gbpages,
            mmu.pdptrs,
        )
        vcpu.paging = paging
    else:
        mmu.pdptrs_cr3 = None
    mmu.paging = paging
    mmu.root_role = _root_role(paging)
    mmu.permissions = hardware_permissions(paging)
    kvm_mmu_free_roots(vcpu)
    return mmu


def _root_role(paging: PagingState) -> Role:
    mode = paging.mode
    if mode is PagingMode.NONE:
        return Role(2, direct=True)
    wp = bool(paging.cr0 & CR0_WP)
    return Role(
        mode.levels if mode.levels > 3 else 2,
        has_4_byte_gpte=mode is PagingMode.BITS32,
        efer_nx=bool(paging.efer & EFER_NXE),
        cr0_wp=wp,
        smep_andnot_wp=bool(paging.cr4 & CR4_SMEP) and not wp,
        smap_andnot_wp=bool(paging.cr4 & CR4_SMAP) and not wp,
        cr4_pse=bool(paging.cr4 & CR4_PSE),
    )


def load_pdptrs(vcpu: KvmVcpu, cr3: int) -> bool:
    """Read the four registers that a PAE guest's CR3 refers to; ``False``: MOV to CR3 gets #GP.

    The read is KVM's own.  A page that is not there looks like a reserved bit: this -EFAULT goes
    nowhere.
    """
    mmu, kvm = vcpu.mmu, vcpu.kvm
    assert mmu is not None
    table = cr3 & 0xFFFF_FFE0
    preemption_point("load_pdptrs: find the slot", "memslots")
    slot = kvm.memslots.gfn_to_memslot(table >> 12)
    if slot is None:
        return False
    hva = slot.hva_of_gfn(table >> 12) + (table & 0xFFF)
    preemption_point("load_pdptrs: read guest memory", ("page", hva & -4096))
    data = kvm.mm.copy_from_user(hva, 32)
    if data is None:
        return False
    a, b, c, d = (int.from_bytes(data[at : at + 8], "little") for at in (0, 8, 16, 24))
    formats = level_formats(
        PagingMode.PAE, vcpu.paging.maxphyaddr, nxe=True, pse=False, gbpages=False
    )
    reserved = formats[3].reserved_table
    if any(pdpte & PT_PRESENT_MASK and pdpte & reserved for pdpte in (a, b, c, d)):
        return False
    mmu.pdptrs, mmu.pdptrs_cr3 = (a, b, c, d), cr3
    mmu.paging = None  # whoever walks next takes them
    return True


# -- roots -----------------------------------------------------------------------------------------


def kvm_mmu_reload(vcpu: KvmVcpu) -> int:
    """See to it that there are roots: 0, or a negative errno.  Nothing to do with NPT or EPT."""
    if vcpu.mmu is None:
        return 0
    mmu = kvm_init_mmu(vcpu)
    preemption_point("kvm_mmu_reload: look at the root", _MMU)
    return kvm_mmu_load(vcpu, mmu) if mmu.is_obsolete() else 0


def kvm_mmu_load(vcpu: KvmVcpu, mmu: KvmMmu) -> int:
    """Take the roots that CR3 asks for."""
    kvm_mmu_free_roots(vcpu)
    mmu.must_reload = False
    vcpu.mmio = None  # which knows a device by its linear address
    kvm = vcpu.kvm
    preemption_point("kvm_mmu_load: take mmu_lock", _MMU, True)
    with kvm.second_stage.mmu_lock:
        r = make_mmu_pages_available(kvm)
        if r == 0:
            mmu.roots = tuple(_alloc_roots(vcpu, mmu))
        flush = begin_flush(shadow_table(kvm))
    finish_flush(kvm, flush)
    return r


def _alloc_roots(vcpu: KvmVcpu, mmu: KvmMmu) -> list[KvmMmuPage | None]:
    """``mmu_alloc_direct_roots`` and ``mmu_alloc_shadow_roots``."""
    paging, role = vcpu.paging, mmu.root_role
    if role.direct:
        # Without paging addresses have 32 bits: four pages of 1 GiB each.
        roots = [mmu_alloc_root(vcpu, i << 18, role) for i in range(4)]
    elif paging.mode is PagingMode.BITS32:
        gfn = paging.root.gpa >> 12
        roots = [mmu_alloc_root(vcpu, gfn, role._replace(quadrant=i)) for i in range(4)]
    elif paging.mode is PagingMode.PAE:
        roots = [
            mmu_alloc_root(vcpu, (pdpte & (1 << 52) - 1) >> 12, role)
            if pdpte & PT_PRESENT_MASK
            else None
            for pdpte in mmu.pdptrs
        ]
    else:
        roots = [mmu_alloc_root(vcpu, paging.root.gpa >> 12, role)]
    return roots


def mmu_alloc_root(vcpu: KvmVcpu, gfn: int, role: Role) -> KvmMmuPage | None:
    """A page to begin walks in."""
    sp = kvm_mmu_get_shadow_page(vcpu, gfn, role)
    if sp is not None:
        sp.root_count += 1
    return sp


def kvm_mmu_free_roots(vcpu: KvmVcpu) -> None:
    """Let go of the roots; a page that nobody else has stays until its room is wanted."""
    mmu = vcpu.mmu
    if mmu is None or mmu.roots is None:
        return
    preemption_point("kvm_mmu_free_roots: take mmu_lock", _MMU, True)
    with vcpu.kvm.second_stage.mmu_lock:
        for sp in mmu.roots:
            if sp is not None:
                sp.root_count -= 1
        mmu.roots = None


# -- single entries --------------------------------------------------------------------------------


def kvm_mmu_invlpg(vcpu: KvmVcpu, gva: int) -> None:
    """Forget what shadows the entry that maps an address.  The caller flushes the vCPU's TLB.

    The kernel does so for entries that are *unsync* alone: others are right anyway.  Ours are too,
    unless userspace has written to a table, of which nobody hears.
    """
    mmu, kvm = vcpu.mmu, vcpu.kvm
    vcpu.mmio = None
    if mmu is None or mmu.is_obsolete():
        return
    preemption_point("FNAME(invlpg): take mmu_lock", _MMU, True)
    with kvm.second_stage.mmu_lock:
        sp = mmu.root_of(gva)
        while sp is not None:
            index = gva >> 3 + sp.role.level * 9 & 511
            if index not in sp.children:
                shadow_table(kvm).drop_spte(sp, index)
                return
            sp = sp.children[index]


def kvm_mmu_zap_gfn(kvm: Kvm, gfn: int) -> None:
    """Forget every entry for a frame."""
    preemption_point("kvm_zap_rmap: take mmu_lock", _MMU, True)
    with kvm.second_stage.mmu_lock:
        shadow_table(kvm).unmap_gfns(range(gfn, gfn + 1))
