"""Keeping shadow pages: getting one, filling an entry, and taking them back.

The shadow-paging part of ``arch/x86/kvm/mmu/mmu.c``, under its names.  A shadow page is a copy, and
is right for as long as KVM hears of every write to the guest's table: so the table's frame is
write-tracked (:mod:`~guestfault.softkvm.page_track`) while a page shadows it, a guest's write to it
is emulated, and :func:`kvm_mmu_track_write` drops what the write has changed.

The kernel spares the guest that for tables of the last level: it lets it write them, marks their
shadow pages *unsync*, and reads them anew when the guest flushes its TLB.  That is an optimisation
and is not done here; nor is prefetching of neighbouring entries (``FNAME(pte_prefetch)``).

Where rights are taken away TLBs must be flushed.  The kernel does it at once, with ``mmu_lock``
held.  Here nobody waits for another thread with the lock in hand: :func:`finish_flush` is called
after it.  What the flush is needed for, that a table just write-protected changes no more, must not
be taken for granted meanwhile (:attr:`~guestfault.softkvm.shadow_page.ShadowTable.flushing`).
"""

from __future__ import annotations

import errno

from guestfault.softkvm.kvm_host import Kvm, KvmVcpu, kvm_flush_remote_tlbs
from guestfault.softkvm.memslots import KVM_MEMSLOT_INVALID, KvmMemorySlot
from guestfault.softkvm.mmu_internal import KvmPageFault, RetPf
from guestfault.softkvm.page_track import (
    kvm_page_track_register_notifier,
    kvm_slot_page_track_add_page,
    kvm_slot_page_track_is_active,
    kvm_slot_page_track_remove_page,
)
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.second_stage import make_mmio_spte
from guestfault.softkvm.shadow_page import (
    ACC_WRITE_MASK,
    SPTE_ADDRESS_MASK,
    KvmMmuPage,
    Role,
    ShadowTable,
    make_spte,
    mmio_access_bits,
)
from guestfault.x86.entries import PT_WRITABLE_MASK

__all__ = [
    "begin_flush",
    "finish_flush",
    "kvm_mmu_change_mmu_pages",
    "kvm_mmu_get_child_sp",
    "kvm_mmu_get_shadow_page",
    "kvm_mmu_init_vm",
    "kvm_mmu_prepare_zap_page",
    "kvm_mmu_track_write",
    "kvm_mmu_unprotect_page",
    "kvm_mmu_zap_all_fast",
    "make_mmu_pages_available",
    "mmu_set_spte",
    "shadow_child",
    "shadow_table",
]

KVM_MIN_FREE_MMU_PAGES = 5
KVM_REFILL_PAGES = 25
KVM_PERMILLE_MMU_PAGES = 20
KVM_MIN_ALLOC_MMU_PAGES = 64
_FLOOD = 3  # writes to a table in a row, with no fault that used it, after which it is none

_MMU = "mmu"


def kvm_mmu_init_vm(kvm: Kvm) -> None:
    """Give the VM shadow pages, and have them hear of writes to the tables that they shadow."""
    kvm.second_stage.shadow = ShadowTable()
    kvm_page_track_register_notifier(kvm, _TrackNotifier(kvm))


def shadow_table(kvm: Kvm) -> ShadowTable:
    """The shadow pages of a VM that has any."""
    table = kvm.second_stage.shadow
    assert table is not None
    return table


class _TrackNotifier:
    def __init__(self, kvm: Kvm) -> None:
        self._kvm = kvm

    def track_write(self, vcpu: KvmVcpu, gpa: int, data: bytes) -> None:
        kvm_mmu_track_write(vcpu, gpa, data)

    def track_flush_slot(self, slot: KvmMemorySlot) -> None:
        kvm_mmu_zap_all_fast(self._kvm)


# -- how many pages there may be -------------------------------------------------------------------


def kvm_mmu_max_pages(kvm: Kvm) -> int:
    """``n_max_mmu_pages``: what userspace has set, or two percent of the VM's pages."""
    if set_by_user := shadow_table(kvm).n_max_mmu_pages:
        return set_by_user
    pages = sum(slot.npages for slot in kvm.memslots.slots)
    return max(KVM_MIN_ALLOC_MMU_PAGES, pages * KVM_PERMILLE_MMU_PAGES // 1000)


def kvm_mmu_change_mmu_pages(kvm: Kvm, goal: int) -> None:
    """``KVM_SET_NR_MMU_PAGES``: no more shadow pages than this."""
    preemption_point("kvm_mmu_change_mmu_pages: take mmu_lock", _MMU, True)
    with kvm.second_stage.mmu_lock:
        table = shadow_table(kvm)
        table.n_max_mmu_pages = max(goal, KVM_MIN_ALLOC_MMU_PAGES)
        kvm_mmu_zap_oldest_mmu_pages(kvm, len(table.active) - table.n_max_mmu_pages)
        flush = begin_flush(table)
    finish_flush(kvm, flush)


def make_mmu_pages_available(kvm: Kvm) -> int:
    """Room for the pages that a fault can need: 0, or -ENOSPC.  ``mmu_lock`` is held."""
    most = kvm_mmu_max_pages(kvm)
    active = shadow_table(kvm).active
    if most - len(active) >= KVM_MIN_FREE_MMU_PAGES:
        return 0
    kvm_mmu_zap_oldest_mmu_pages(kvm, KVM_REFILL_PAGES - (most - len(active)))
    return 0 if len(active) < most else -errno.ENOSPC


def kvm_mmu_zap_oldest_mmu_pages(kvm: Kvm, count: int) -> None:
    """Zap the pages that were made first.  A root in use stays: it would only be made anew."""
    if count > 0:
        for sp in [sp for sp in shadow_table(kvm).active if not sp.root_count][:count]:
            kvm_mmu_prepare_zap_page(kvm, sp)


# -- pages -----------------------------------------------------------------------------------------


def kvm_mmu_get_shadow_page(vcpu: KvmVcpu, gfn: int, role: Role) -> KvmMmuPage | None:
    """The page for this guest table in this role, made if need be.  ``mmu_lock`` is held.

    ``None`` if the guest's table is in no slot, or in one that is going.
    """
    table = shadow_table(vcpu.kvm)
    sp = table.find(gfn, role)
    if sp is not None:
        return sp
    slot = None if role.direct else vcpu.kvm.memslots.gfn_to_memslot(gfn)
    if not role.direct and (slot is None or slot.flags & KVM_MEMSLOT_INVALID):
        # A slot that is going has had its pages zapped, or will have once we let go of the lock.
        return None
    sp = table.add(gfn, role)
    if slot is not None:  # account_shadowed()
        sp.slot = slot
        kvm_slot_page_track_add_page(vcpu.kvm, slot, gfn)
        # Even where no entry was writable: one may have been until just now, and whoever took the
        # right away may not have flushed the TLBs yet.
        table.must_flush = True
    return sp


def shadow_child(
    vcpu: KvmVcpu, parent: KvmMmuPage, index: int, gfn: int, *, direct: bool, access: int
) -> KvmMmuPage | None:
    """The page that this entry of ``parent`` refers to, made and linked if need be."""
    child = parent.children.get(index)
    if (
        child is not None
        and (child.gfn, child.role.direct) == (gfn, direct)
        # validate_direct_spte(): the page stands for one entry of the guest's, with its rights.
        and (not direct or child.role.access == access)
    ):
        return child
    table = shadow_table(vcpu.kvm)
    table.must_flush |= child is not None
    child = kvm_mmu_get_child_sp(vcpu, parent, index, gfn, direct=direct, access=access)
    if child is not None:
        table.link(parent, index, child)
    return child


def kvm_mmu_get_child_sp(
    vcpu: KvmVcpu, parent: KvmMmuPage, index: int, gfn: int, *, direct: bool, access: int
) -> KvmMmuPage | None:
    """The page that this entry of ``parent`` is to refer to."""
    role = parent.role._replace(level=parent.role.level - 1, direct=direct, access=access)
    if role.has_4_byte_gpte:
        # A guest's table of 1024 entries is shadowed by two pages of 512.
        role = role._replace(quadrant=index & 1)
    return kvm_mmu_get_shadow_page(vcpu, gfn, role)


def kvm_mmu_prepare_zap_page(kvm: Kvm, sp: KvmMmuPage) -> None:
    """Take a page out of use.  A vCPU whose root it is loads another.  ``mmu_lock`` is held."""
    table = shadow_table(kvm)
    table.remove(sp)
    if sp.slot is not None:  # unaccount_shadowed()
        kvm_slot_page_track_remove_page(sp.slot, sp.gfn)
    table.must_flush = True


def kvm_mmu_zap_all_fast(kvm: Kvm) -> None:
    """Zap every page: a slot goes, or moves."""
    preemption_point("kvm_mmu_zap_all_fast: take mmu_lock", _MMU, True)
    with kvm.second_stage.mmu_lock:
        for sp in list(shadow_table(kvm).active):
            kvm_mmu_prepare_zap_page(kvm, sp)
        flush = begin_flush(shadow_table(kvm))
    finish_flush(kvm, flush)


def kvm_mmu_unprotect_page(kvm: Kvm, gfn: int) -> bool:
    """Let the guest write to a table by itself, by not shadowing it; whether it was shadowed."""
    preemption_point("kvm_mmu_unprotect_page: take mmu_lock", _MMU, True)
    with kvm.second_stage.mmu_lock:
        pages = shadow_table(kvm).with_gptes(gfn)
        for sp in pages:
            kvm_mmu_prepare_zap_page(kvm, sp)
        flush = begin_flush(shadow_table(kvm))
    finish_flush(kvm, flush)
    return bool(pages)


# -- entries ---------------------------------------------------------------------------------------


def mmu_set_spte(
    vcpu: KvmVcpu, sp: KvmMmuPage, index: int, pte_access: int, gfn: int, fault: KvmPageFault
) -> int:
    """Install the entry that answers a fault: FIXED, SPURIOUS, or EMULATE for a tracked frame.

    ``mmu_lock`` is held and the fault is not stale.
    """
    slot, table = fault.slot, shadow_table(vcpu.kvm)
    if slot is None:
        vcpu.stat.pf_mmio_spte_created += 1
        table.unlink(sp, index)
        table.set_spte(
            sp, index, make_mmio_spte(fault.generation) | mmio_access_bits(pte_access), gfn
        )
        return RetPf.EMULATE
    write_protected = False
    if not fault.map_writable or (slot.dirty_bitmap and not fault.write):
        # With a dirty log, a page becomes writable only by the write that is then logged.
        pte_access &= ~ACC_WRITE_MASK
    elif pte_access & ACC_WRITE_MASK and kvm_slot_page_track_is_active(slot, gfn):
        pte_access &= ~ACC_WRITE_MASK
        write_protected = True
    spte = make_spte(fault.pfn << 12, pte_access)
    old, old_gfn = sp.spt.get(index, (0, 0))
    r = RetPf.EMULATE if write_protected and fault.write else RetPf.FIXED
    if old == spte and old_gfn == gfn:
        return RetPf.SPURIOUS if r is RetPf.FIXED else r
    if (old & SPTE_ADDRESS_MASK and old_gfn != gfn) or old & PT_WRITABLE_MASK & ~spte:
        table.must_flush = True
    table.must_flush |= table.unlink(sp, index)
    table.set_spte(sp, index, spte, gfn)
    if spte & PT_WRITABLE_MASK and fault.write:
        slot.mark_page_dirty(gfn)
    return r


def kvm_mmu_track_write(vcpu: KvmVcpu, gpa: int, data: bytes) -> None:
    """KVM has written to guest memory: drop what shadows the entries that were written.

    ``kvm_mmu_pte_write`` in older kernels.  The next use of such an entry faults, and reads it.
    """
    kvm, gfn = vcpu.kvm, gpa >> 12
    table = shadow_table(kvm)
    preemption_point("kvm_mmu_track_write: take mmu_lock", _MMU, True)
    with kvm.second_stage.mmu_lock:
        pages = table.with_gptes(gfn)
        table.gpte_seq += bool(pages)
        for sp in pages:
            if _detect_write_misaligned(sp, gpa, len(data)) or _detect_write_flooding(sp):
                # Hardly a page table any more.
                kvm_mmu_prepare_zap_page(kvm, sp)
                continue
            for index in _get_written_sptes(sp, gpa):
                dropped = table.drop_spte(sp, index)
                table.must_flush |= table.unlink(sp, index) or dropped
        flush = begin_flush(table)
    finish_flush(kvm, flush)


def _detect_write_misaligned(sp: KvmMmuPage, gpa: int, size: int) -> bool:
    offset, pte_size = gpa & 0xFFF, 4 if sp.role.has_4_byte_gpte else 8
    if size == 1 and not offset & pte_size - 1:
        return False  # the flags of one entry: Linux clears a bit so
    return bool((offset ^ offset + size - 1) & -pte_size) or size < 4


def _detect_write_flooding(sp: KvmMmuPage) -> bool:
    if sp.role.level == 1:
        return False
    sp.write_flooding_count += 1
    return sp.write_flooding_count >= _FLOOD


def _get_written_sptes(sp: KvmMmuPage, gpa: int) -> range:
    """The entries of the page that stand for the one of the guest's at ``gpa``."""
    if not sp.role.has_4_byte_gpte:
        return range((gpa & 0xFFF) // 8, (gpa & 0xFFF) // 8 + 1)
    gpte = (gpa & 0xFFF) // 4
    # An entry of a 32-bit directory maps 4 MiB, and so takes two of the shadow page's.
    each = 2 if sp.role.level == 2 else 1
    first = gpte * each
    return range(first % 512, first % 512 + each) if first // 512 == sp.role.quadrant else range(0)


# -- TLBs ------------------------------------------------------------------------------------------


def begin_flush(table: ShadowTable) -> bool:
    """Just before ``mmu_lock`` is let go: whether to call :func:`finish_flush` after it."""
    if not table.must_flush:
        return False
    table.must_flush = False
    table.flushing += 1
    return True


def finish_flush(kvm: Kvm, begun: bool) -> None:
    """Without the lock: see to it that no vCPU uses what was taken away."""
    if not begun:
        return
    kvm_flush_remote_tlbs(kvm)
    preemption_point("kvm_flush_remote_tlbs: take mmu_lock", _MMU, True)
    with kvm.second_stage.mmu_lock:
        shadow_table(kvm).flushing -= 1
        shadow_table(kvm).gpte_seq += 1
