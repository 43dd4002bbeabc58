"""A page fault under shadow paging: ``arch/x86/kvm/mmu/paging_tmpl.h``, under its names.

Linux compiles that file once for each format of guest page tables, hence ``FNAME(page_fault)`` for
what is :func:`page_fault` here; the formats are :mod:`guestfault.x86.entries`' business.

The fault's address is linear.  KVM walks the guest's tables itself (:func:`walk_addr`), with plain
copies from userspace memory, and that makes a difference to whoever brings guest memory in on
demand: a table that cannot be read looks exactly like an entry that is not present.  The -EFAULT is
swallowed, *the guest* gets a page fault that no processor would have raised, and there is no exit
that anybody could answer.  With NPT or EPT the processor walks, an absent table is a second-stage
fault like any other, and comes out as one.

What the walk has found must still hold when the entry is made from it, and the guest may write to
its tables at any time.  But a table that has a shadow page is write-protected.  So the walk counts
if all its tables had one while it read them, and nothing was written (:func:`gpte_changed`).

The processor never sees the guest's tables, so that accessed and dirty flags are KVM's to set.
"""

from __future__ import annotations

import errno
from typing import NamedTuple

from guestfault.dialect.record import Site
from guestfault.softkvm.efault import kvm_handle_efault
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.memslots import KVM_MEMSLOT_INVALID, PAGE_SIZE, KvmMemorySlot
from guestfault.softkvm.mmu import (
    is_page_fault_stale,
    kvm_faultin_pfn,
    page_fault_handle_page_track,
)
from guestfault.softkvm.mmu_internal import KvmPageFault, RetPf
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.refusal import GuestException
from guestfault.softkvm.shadow import (
    begin_flush,
    finish_flush,
    make_mmu_pages_available,
    mmu_set_spte,
    shadow_child,
    shadow_table,
)
from guestfault.softkvm.shadow_context import kvm_init_mmu
from guestfault.softkvm.shadow_page import (
    ACC_EXEC_MASK,
    ACC_USER_MASK,
    ACC_WRITE_MASK,
    ShadowTable,
    access_of_rights,
    spte_index,
)
from guestfault.uapi import kvm as uapi
from guestfault.x86.entries import PT64_NX_MASK
from guestfault.x86.paging import (
    AccessKind,
    Entry,
    EntryUnreadable,
    EntryUpdate,
    NonCanonical,
    PageFault,
    Translation,
    walk,
)
from guestfault.x86.paging_state import ALL_RIGHTS
from guestfault.x86.registers import (
    CR0_WP,
    CR4_SMEP,
    PF_VECTOR,
    PFERR_FETCH_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)

__all__ = ["PFERR_IMPLICIT_ACCESS", "GuestWalker", "gva_to_gpa", "page_fault", "walk_addr"]

PFERR_IMPLICIT_ACCESS = 1 << 48
"""KVM's own: the access is the processor's to a table of its own, and RFLAGS.AC is no help."""

_MMU, _MEMSLOTS = "mmu", "memslots"
_READ, _WRITE, _FETCH = AccessKind.READ, AccessKind.WRITE, AccessKind.FETCH


class GuestWalker(NamedTuple):
    """``struct guest_walker``: where a walk of the guest's tables came to."""

    seq: int
    """:attr:`ShadowTable.gpte_seq` when it began."""
    entries: tuple[Entry, ...]
    """What it read, from the root down: (gpa, value, level)."""
    pt_access: tuple[int, ...]
    """For each of them, the ``ACC_*`` gathered on the way to its table."""
    gpa: int
    pte_access: int


# -- the guest's tables ----------------------------------------------------------------------------


def walk_addr(
    vcpu: KvmVcpu,
    addr: int,
    kind: AccessKind,
    user: bool,
    *,
    ac: bool = False,
    implicit: bool = False,
) -> GuestWalker | PageFault | NonCanonical:
    """``FNAME(walk_addr)``: walk the guest's tables for an access, and set their flags for it.

    What cannot be read, or not be marked as used, is a page fault of the guest.  With NPT or EPT it
    is the emulator's walk, and nothing is made from it.
    """
    seq = 0
    while True:
        if vcpu.mmu is not None:
            preemption_point("FNAME(walk_addr): read the tables' sequence", _MMU)
            seq = shadow_table(vcpu.kvm).gpte_seq
        found = gva_to_gpa(vcpu, addr, kind, user, ac=ac, implicit=implicit)
        if not isinstance(found, Translation):
            return found
        entries = list(found.entries)
        r = update_accessed_dirty_bits(vcpu, entries, found.updates)
        if r < 0:
            return _not_present(vcpu, addr, kind, user and not implicit, found.entries)
        if r == 0:
            return _walker(seq, found, tuple(entries), kind)


def gva_to_gpa(
    vcpu: KvmVcpu,
    addr: int,
    kind: AccessKind,
    user: bool,
    *,
    ac: bool = False,
    implicit: bool = False,
) -> Translation | PageFault | NonCanonical:
    """The walk by itself, which writes nothing."""
    if vcpu.mmu is not None:
        kvm_init_mmu(vcpu)

    def read_gpte(gpa: int, size: int) -> int | None:
        return _read_guest(vcpu, gpa, size)

    found = walk(vcpu.paging, addr, kind, user, read_gpte, ac=ac, implicit=implicit)
    if isinstance(found, EntryUnreadable):
        return _not_present(vcpu, addr, kind, user and not implicit, found.entries)
    return found


def _not_present(
    vcpu: KvmVcpu, addr: int, kind: AccessKind, user: bool, entries: tuple[Entry, ...]
) -> PageFault:
    code = PFERR_USER_MASK if user else 0
    if kind is _WRITE:
        code |= PFERR_WRITE_MASK
    elif kind is _FETCH and vcpu.paging.reports_fetch:
        code |= PFERR_FETCH_MASK
    return PageFault(addr, code, 0, entries)


def _walker(
    seq: int, found: Translation, entries: tuple[Entry, ...], kind: AccessKind
) -> GuestWalker:
    rights, pt_access = ALL_RIGHTS, []
    for _, value, _ in entries:
        pt_access.append(access_of_rights(rights))
        rights &= value ^ PT64_NX_MASK
    pte_access = access_of_rights(found.rights)
    if not found.dirty and kind is not _WRITE:
        pte_access &= ~ACC_WRITE_MASK  # protect_clean_gpte(): see the write that dirties it
    return GuestWalker(seq, entries, tuple(pt_access), found.gpa, pte_access)


def update_accessed_dirty_bits(
    vcpu: KvmVcpu, entries: list[Entry], updates: tuple[EntryUpdate, ...]
) -> int:
    """Set flags in the guest's tables: 0, 1 if an entry is another one now, -EFAULT.

    The -EFAULT does not propagate: it becomes a page fault of the guest's.
    """
    for gpa, value, size in updates:
        slot = _slot(vcpu, gpa)
        if slot is None:
            return -errno.EFAULT
        if slot.flags & uapi.KVM_MEM_READONLY:
            continue  # tables in ROM have no flags to set
        # A table that refers to itself is on the way more than once.
        places = [i for i, entry in enumerate(entries) if entry[0] == gpa]
        old = entries[places[0]][1]
        hva = slot.hva_of_gfn(gpa >> 12) + (gpa & 0xFFF)
        # In the kernel one step, a compare-and-exchange.  Python has none on shared memory: what a
        # guest of another thread writes between these two is lost.
        preemption_point("FNAME(update_accessed_dirty_bits): exchange", ("page", hva & -4096), True)
        data = vcpu.kvm.mm.copy_from_user(hva, size)
        if data is None:
            return -errno.EFAULT
        if int.from_bytes(data, "little") != old:
            return 1
        if not vcpu.kvm.mm.copy_to_user(hva, value.to_bytes(size, "little")):
            return -errno.EFAULT
        slot.mark_page_dirty(gpa >> 12)
        for i in places:
            entries[i] = gpa, value, entries[i][2]
    return 0


def _slot(vcpu: KvmVcpu, gpa: int) -> KvmMemorySlot | None:
    preemption_point("gfn_to_hva: find the slot", _MEMSLOTS)
    slot = vcpu.kvm.memslots.gfn_to_memslot(gpa >> 12)
    return None if slot is None or slot.flags & KVM_MEMSLOT_INVALID else slot


def _read_guest(vcpu: KvmVcpu, gpa: int, size: int) -> int | None:
    """``__get_user``: may sleep, and fails for what is not there."""
    slot = _slot(vcpu, gpa)
    if slot is None:
        return None
    hva = slot.hva_of_gfn(gpa >> 12) + (gpa & 0xFFF)
    preemption_point("FNAME(walk_addr): read a guest PTE", ("page", hva & -4096))
    data = vcpu.kvm.mm.copy_from_user(hva, size)
    return None if data is None else int.from_bytes(data, "little")


def gpte_changed(table: ShadowTable, walker: GuestWalker) -> bool:
    """Whether an entry may be another one than the walk read.  ``mmu_lock`` is held.

    Linux reads it once more, which cannot sleep here.  We go by a sequence number, as with
    invalidations: a table that has a shadow page is written by way of KVM only, which advances the
    number, and so does the flush after which a table can no longer be written otherwise.
    """
    return table.flushing > 0 or table.gpte_seq != walker.seq


# -- the fault -------------------------------------------------------------------------------------


def page_fault(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """``FNAME(page_fault)``: a :class:`RetPf`, or a negative errno.

    A page fault of the guest's own is left in ``vcpu.mmu.injected``; the result is RETRY.
    """
    while True:
        r, again = _page_fault_once(vcpu, fault)
        if not again:
            return r


def _page_fault_once(vcpu: KvmVcpu, fault: KvmPageFault) -> tuple[int, bool]:
    """The result, and whether to begin anew: a table was write-protected, and TLBs are flushed."""
    code, mmu = fault.error_code, kvm_init_mmu(vcpu)
    user = code & PFERR_USER_MASK != 0
    implicit = code & PFERR_IMPLICIT_ACCESS != 0
    kind = _WRITE if fault.write else _FETCH if code & PFERR_FETCH_MASK else _READ
    walker = walk_addr(vcpu, fault.addr, kind, user, ac=vcpu.smap_ac, implicit=implicit)
    if not isinstance(walker, GuestWalker):
        if not fault.prefetch and isinstance(walker, PageFault):
            mmu.injected = GuestException(PF_VECTOR, walker.error_code, walker.gva)
        return RetPf.RETRY, False
    mmu.fault_gpa = walker.gpa
    fault.gfn = walker.gpa >> 12

    stage = vcpu.kvm.second_stage
    preemption_point("FNAME(page_fault): read mmu_invalidate_seq", _MMU)
    fault.mmu_seq = stage.mmu_invalidate_seq
    preemption_point("FNAME(page_fault): find the slot", _MEMSLOTS)
    memslots = vcpu.kvm.memslots
    fault.slot, fault.generation = memslots.gfn_to_memslot(fault.gfn), memslots.generation
    if page_fault_handle_page_track(vcpu, fault):
        return RetPf.EMULATE, False
    r = kvm_faultin_pfn(vcpu, fault)
    if r != RetPf.CONTINUE:
        return r, False
    pte_access = _cr0_wp_fix_up(vcpu, fault, walker.pte_access, user)

    preemption_point("FNAME(page_fault): take mmu_lock", _MMU, True)
    with stage.mmu_lock:
        if is_page_fault_stale(vcpu, fault):
            return RetPf.RETRY, False
        r = make_mmu_pages_available(vcpu.kvm)
        if r == 0:
            r = fetch(vcpu, fault, walker, pte_access)
        flush = begin_flush(shadow_table(vcpu.kvm))
    finish_flush(vcpu.kvm, flush)
    return r, flush and r == RetPf.RETRY


def _cr0_wp_fix_up(vcpu: KvmVcpu, fault: KvmPageFault, pte_access: int, user: bool) -> int:
    """What lets a supervisor write to a read-only page while the guest has CR0.WP off.

    The processor has it on.  So the page becomes a supervisor's, and writable, until the next
    access by a user has it turned back; with SMEP the supervisor must not execute it.  A supervisor
    can then read it whatever SMAP says: Linux leaves it at that, and so does this.
    """
    paging = vcpu.paging
    needed = fault.slot is not None and fault.write and not pte_access & ACC_WRITE_MASK
    if needed and not user and not paging.cr0 & CR0_WP:
        pte_access = (pte_access | ACC_WRITE_MASK) & ~ACC_USER_MASK
        if paging.cr4 & CR4_SMEP:
            pte_access &= ~ACC_EXEC_MASK
    return pte_access


def fetch(vcpu: KvmVcpu, fault: KvmPageFault, walker: GuestWalker, pte_access: int) -> int:
    """``FNAME(fetch)``: make shadow pages along the walk, and the entry at its end.

    ``mmu_lock`` is held and the fault is not stale.
    """
    mmu, table = vcpu.mmu, shadow_table(vcpu.kvm)
    assert mmu is not None
    sp = mmu.root_of(fault.addr)
    if sp is None:  # what had no slot has one now
        mmu.must_reload = True
        return RetPf.RETRY
    if gpte_changed(table, walker):
        return RetPf.RETRY
    level = sp.role.level
    for (gpa, _, gpte_level), access in zip(walker.entries, walker.pt_access, strict=True):
        if gpte_level >= level:
            continue
        index = spte_index(fault.addr, level)
        sp.write_flooding_count = 0
        sp = shadow_child(vcpu, sp, index, gpa >> 12, direct=False, access=access)
        if sp is None or table.must_flush:
            # Its table was just write-protected, and may have been written to until now.
            return RetPf.RETRY
        level = gpte_level
    while level > 1:  # the guest's page is a large one
        first_gfn = fault.gfn & -(1 << (level - 1) * 9)
        sp = shadow_child(
            vcpu, sp, spte_index(fault.addr, level), first_gfn, direct=True, access=pte_access
        )
        assert sp is not None  # a direct page has no table that could be gone
        level -= 1
    if sp.role.level != 1:
        vcpu.kvm.warn_on_once("FNAME(fetch): the walk ends at another level than the fault's")
        return kvm_handle_efault(
            vcpu,
            Site.FETCH,
            fault.gfn << 12,
            PAGE_SIZE,
            write=fault.write,
            exec_=fault.exec,
        )
    return mmu_set_spte(vcpu, sp, spte_index(fault.addr, 1), pte_access, fault.gfn, fault)
