"""Where the two stages meet: from a guest virtual access to host memory.

On a TLB miss the processor asks :func:`tlb_fill`.  It walks the guest's own page tables
(:mod:`guestfault.x86.paging`), whose entries are guest memory too and so go through the second
stage like any access, then takes the page itself through
:func:`~guestfault.softkvm.mmu.kvm_mmu_page_fault`.  A refusal leaves its reason in
``vcpu.refusal``.

To the second stage an access to a page table is always a write, whether the walk sets a flag there
or only reads (AMD64 APM volume 2, "Nested Paging"; it is so under EPT, too, where that keeps
accessed and dirty flags).  So a guest whose tables cannot be written, because the host has mapped
them read-only or their slot is ``KVM_MEM_READONLY``, gets nowhere through them, unless KVM emulates
what it wanted to do; and all accesses are a user's.

The same road serves what the processor accesses for itself, and KVM does here in its place (the
delivery of events, the check of a port): :func:`read_guest_virt` and :func:`write_guest_virt`.
KVM's own accesses are another matter: :mod:`guestfault.softkvm.guest_access`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

from unicorn import UC_PROT_EXEC, UC_PROT_READ, UC_PROT_WRITE

from guestfault.softkvm import preempt
from guestfault.softkvm.kvm_host import KvmVcpu, Walked
from guestfault.softkvm.mmu import kvm_mmu_page_fault
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.processor import PRIVATE_PAGE, Access
from guestfault.softkvm.refusal import (
    AccessFailed,
    GuestException,
    Refusal,
)
from guestfault.softkvm.second_stage import PAGE_SIZE, PT_READ, PT_WRITABLE, SPTE_MMIO, SPTE_PRIVATE
from guestfault.softkvm.shadow_page import KvmMmu, access_of_spte
from guestfault.softkvm.shadow_tlb import read_linear, shadow_entry, write_linear
from guestfault.x86.entries import (
    ADDRESS_MASK,
    PT64_NX_MASK,
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_PRESENT_MASK,
)
from guestfault.x86.paging import (
    AccessKind,
    EntryUnreadable,
    NonCanonical,
    PageFault,
    Translation,
    WalkResult,
    walk,
    walk_from,
)
from guestfault.x86.registers import (
    GP_VECTOR,
    PF_VECTOR,
    PFERR_FETCH_MASK,
    PFERR_GUEST_PAGE_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)

__all__ = ["probe_guest_virt", "read_guest_virt", "tlb_fill", "translate", "write_guest_virt"]

_OFFSET = PAGE_SIZE - 1
_READ_FLAGS = PT_PRESENT_MASK | PT_ACCESSED_MASK
_WRITTEN = _READ_FLAGS | PT_DIRTY_MASK
_READ, _WRITE, _FETCH = AccessKind.READ, AccessKind.WRITE, AccessKind.FETCH
_KIND = {int(Access.READ): _READ, int(Access.WRITE): _WRITE, int(Access.FETCH): _FETCH}
_NOT_MEMORY = PFERR_PRESENT_MASK | PFERR_RSVD_MASK
# What a fault of the second stage is about, as its error code says, by the kind of access.
_CODE = PFERR_USER_MASK, PFERR_USER_MASK | PFERR_WRITE_MASK, PFERR_USER_MASK | PFERR_FETCH_MASK
_RIGHT = PT_READ, PT_WRITABLE, PT_READ
_WRITABLE_OR_PRIVATE = PT_WRITABLE | SPTE_PRIVATE
_WALKS = PFERR_GUEST_PAGE_MASK | PFERR_USER_MASK | PFERR_WRITE_MASK


def tlb_fill(vcpu: KvmVcpu, gva: int, access: int) -> tuple[int, int] | None:
    """Answer a TLB miss: (engine-physical page, rights), or ``None`` and ``vcpu.refusal``."""
    kind = _KIND[access]
    if vcpu.mmu is not None:
        return _fill_from_shadow(vcpu, vcpu.mmu, gva, kind)
    # The access that was refused last is usually made again next: as a processor may keep a
    # translation until it is told to forget it, this one is kept for that once.
    asked = gva & ~_OFFSET | vcpu.cpl << 4 | kind
    entry, vcpu.walked = vcpu.walked, None
    if entry is None or entry[3] != asked:
        entry = _settled_entry(vcpu, gva, kind, asked)
    if entry is not None:
        page, rights, dirty, _ = entry
    else:
        found = translate(vcpu, gva, kind)
        if not isinstance(found, Translation):
            vcpu.refusal = _refused(vcpu, found)
            return None
        if found.updates and not _make_updates(vcpu, found):
            return None
        page, rights, dirty = found.gpa & ~_OFFSET, found.rights, found.dirty
    spte = _spte(vcpu, page, _RIGHT[kind], _CODE[kind])
    if spte:
        perms = _first_stage_perms(
            vcpu.paging.permissions,
            vcpu.cpl == 3 and gva & ~_OFFSET != vcpu.system_page,
            vcpu.smap_ac,
            rights & 6 | rights >> 63,
        )
        spte &= _WRITABLE_OR_PRIVATE
        if spte & SPTE_PRIVATE:
            page |= PRIVATE_PAGE
        # A clean page stays unwritable in the TLB, so that the write that dirties it is seen.
        return page, perms if dirty and spte & PT_WRITABLE else perms & ~UC_PROT_WRITE
    if not vcpu.smap:  # which makes the answer depend on RFLAGS.AC as well
        vcpu.walked = entry
    vcpu.refused_page = gva & ~_OFFSET
    return None


def _fill_from_shadow(
    vcpu: KvmVcpu, mmu: KvmMmu, gva: int, kind: AccessKind
) -> tuple[int, int] | None:
    """Without two-dimensional paging the processor walks what KVM has made for it."""
    implicit = gva & ~_OFFSET == vcpu.system_page
    found = shadow_entry(vcpu, gva, kind, implicit=implicit)
    if found is None:
        return None
    spte, gfn = found
    user = vcpu.cpl == 3 and not implicit
    rights = access_of_spte(spte)
    return gfn << 12, _first_stage_perms(mmu.permissions, user, vcpu.smap_ac, rights)


@functools.lru_cache(maxsize=64)
def _first_stage_perms(permissions: tuple[int, ...], user: bool, ac: bool, rights: int) -> int:
    """What :meth:`~guestfault.x86.paging.PagingState.permits`, for all three kinds at once."""
    perms = ((_READ, UC_PROT_READ), (_WRITE, UC_PROT_WRITE), (_FETCH, UC_PROT_EXEC))
    return sum(
        perm for kind, perm in perms if permissions[kind | user << 2 | ac << 3] >> rights & 1
    )


def _settled_entry(vcpu: KvmVcpu, gva: int, kind: AccessKind, asked: int) -> Walked | None:
    """The usual miss in short: its answer if nothing about it needs a walk.

    The last table is known, and its entry permits the access and has its flags set already.
    """
    shift = vcpu.table_shift
    table = vcpu.tables.get(gva >> shift) if shift else None
    if table is None:
        return None
    paging = vcpu.paging
    size = paging.entry_size
    gpa = table.gpa + (gva >> 12) % (PAGE_SIZE // size) * size
    data = _copy_from_guest(vcpu, gpa, size, PT_WRITABLE, _WALKS)
    if data is None:
        return None
    entry = int.from_bytes(data, "little")
    flags = _WRITTEN if kind is _WRITE else _READ_FLAGS
    if entry & flags != flags or entry & paging.formats[1].reserved_leaf:
        return None
    rights = table.rights & (entry ^ PT64_NX_MASK)
    permitted = paging.permissions[kind | (vcpu.cpl == 3) << 2 | vcpu.smap_ac << 3]
    if not permitted >> (rights & 6 | rights >> 63) & 1:
        return None
    return entry & ADDRESS_MASK, rights, entry & PT_DIRTY_MASK != 0, asked


# -- the processor's own accesses ------------------------------------------------------------------


def read_guest_virt(
    vcpu: KvmVcpu, gva: int, size: int, *, fetch: bool = False, implicit: bool = False
) -> bytes:
    """Read guest memory at a linear address; raises :class:`AccessFailed`.

    ``implicit``: the processor's own accesses, to descriptor tables and the TSS.
    """
    parts = []
    kind = _FETCH if fetch else _READ
    if vcpu.mmu is not None:
        for at, n in _pages(gva, size):
            system = implicit or at & ~_OFFSET == vcpu.system_page
            parts.append(read_linear(vcpu, at, n, kind, implicit=system))
        return b"".join(parts)
    for gpa, n in _resolve(vcpu, gva, size, kind, implicit):
        data = _copy_from_guest(vcpu, gpa, n, PT_READ, _CODE[kind])
        if data is None:
            raise AccessFailed(vcpu.refusal)
        parts.append(data)
    return b"".join(parts)


def write_guest_virt(
    vcpu: KvmVcpu, gva: int, data: bytes, *, implicit: bool = False, word: int = 0
) -> None:
    """Write guest memory at a linear address; raises :class:`AccessFailed`.

    Every page is resolved before the first byte is written.  With the size of a ``word`` that is
    done as these are pushed: from the last page to the first, and for the last word in each.
    """
    if vcpu.mmu is not None:
        _write_by_shadow(vcpu, gva, data, implicit, word)
        return
    pieces = list(_resolve(vcpu, gva, len(data), _WRITE, implicit, word))
    for gpa, n in reversed(pieces) if word else pieces:
        if not _copy_to_guest(vcpu, gpa, data[:n], _CODE[_WRITE]):
            raise AccessFailed(vcpu.refusal)
        data = data[n:]


def probe_guest_virt(vcpu: KvmVcpu, gva: int, size: int) -> None:
    """Make sure that a write would succeed, without writing; raises :class:`AccessFailed`."""
    if vcpu.mmu is not None:
        for at, _ in _pages(gva, size):
            write_linear(vcpu, at, b"")
        return
    for _ in _resolve(vcpu, gva, size, _WRITE, implicit=False):
        pass


def _write_by_shadow(vcpu: KvmVcpu, gva: int, data: bytes, implicit: bool, word: int = 0) -> None:
    pages = [
        (at, n, implicit or at & ~_OFFSET == vcpu.system_page) for at, n in _pages(gva, len(data))
    ]
    if word:
        for at, n, system in reversed(pages):
            write_linear(vcpu, at + max(0, n - word), b"", implicit=system)
    elif len(pages) > 1:
        for at, _, system in pages:
            write_linear(vcpu, at, b"", implicit=system)
    for at, n, system in pages:
        write_linear(vcpu, at, data[:n], implicit=system)
        data = data[n:]


def _pages(gva: int, size: int) -> Iterator[tuple[int, int]]:
    """The (address, size) pieces of an access that lie in one page each."""
    while size > 0:
        n = min(size, PAGE_SIZE - (gva & _OFFSET))
        yield gva, n
        gva, size = gva + n, size - n


def _resolve(
    vcpu: KvmVcpu, gva: int, size: int, kind: AccessKind, implicit: bool, word: int = 0
) -> Iterator[tuple[int, int]]:
    """The (gpa, size) pieces of an access, each page of it resolved in both stages.

    With a ``word`` in the order of pushes, the last page first.
    """
    for at, n in reversed(list(_pages(gva, size))) if word else _pages(gva, size):
        into = max(0, n - word) if word else 0
        found = translate(vcpu, at + into, kind, implicit=implicit)
        if not isinstance(found, Translation):
            raise AccessFailed(_refused(vcpu, found))
        if not _make_updates(vcpu, found) or not _spte(vcpu, found.gpa, _RIGHT[kind], _CODE[kind]):
            raise AccessFailed(vcpu.refusal)
        yield found.gpa - into, n


# -- both stages -----------------------------------------------------------------------------------


def translate(vcpu: KvmVcpu, gva: int, kind: AccessKind, *, implicit: bool = False) -> WalkResult:
    """Walk the guest's tables, from the last of them if this neighbourhood was walked before."""

    def read_entry(gpa: int, size: int) -> int | None:
        data = _copy_from_guest(vcpu, gpa, size, PT_WRITABLE, _WALKS)
        return None if data is None else int.from_bytes(data, "little")

    user, ac, shift = vcpu.cpl == 3, vcpu.smap_ac, vcpu.table_shift
    implicit = implicit or gva & ~_OFFSET == vcpu.system_page
    table = vcpu.tables.get(gva >> shift) if shift else None
    if table is not None:
        found = walk_from(vcpu.paging, table, gva, kind, user, read_entry, ac=ac, implicit=implicit)
        if type(found) is not PageFault:
            return found
        # An entry above may permit more by now: no processor faults on what it only remembers.
        del vcpu.tables[gva >> shift]
    found = walk(vcpu.paging, gva, kind, user, read_entry, ac=ac, implicit=implicit)
    if type(found) is Translation and found.table is not None and found.table.level == 1:
        vcpu.tables[gva >> shift] = found.table
    return found


def _make_updates(vcpu: KvmVcpu, found: Translation) -> bool:
    """Set accessed and dirty bits in the guest's tables; ``False`` if refused."""
    return all(
        _copy_to_guest(vcpu, gpa, value.to_bytes(size, "little"), _WALKS)
        for gpa, value, size in found.updates
    )


def _copy_from_guest(vcpu: KvmVcpu, gpa: int, size: int, right: int, code: int) -> bytes | None:
    """Read inside one guest physical page; ``None`` if refused."""
    while spte := _spte(vcpu, gpa, right, code):
        data = vcpu.kvm.mm.copy_from_user((spte & ~_OFFSET) + (gpa & _OFFSET), size)
        if data is not None:
            return data
        _drop(vcpu, gpa)
    return None


def _copy_to_guest(vcpu: KvmVcpu, gpa: int, data: bytes, code: int) -> bool:
    """Write inside one guest physical page; ``False`` if refused."""
    while spte := _spte(vcpu, gpa, PT_WRITABLE, code):
        if vcpu.kvm.mm.copy_to_user((spte & ~_OFFSET) + (gpa & _OFFSET), data):
            return True
        _drop(vcpu, gpa)
    return False


def _drop(vcpu: KvmVcpu, gpa: int) -> None:
    # The host took the page from under its entry without telling us.  Fault it in again, which
    # says what is wrong with it.
    preemption_point("guest_mmu: drop the SPTE", "mmu", True)
    vcpu.kvm.second_stage.sptes.pop(gpa >> 12, None)


def _spte(vcpu: KvmVcpu, gpa: int, right: int, code: int) -> int:
    """The second-stage entry that has the ``right``, faulted in if need be; 0 if refused.

    ``code`` is what the error code of its fault says of the access.
    """
    sptes = vcpu.kvm.second_stage.sptes
    while True:
        if preempt.scheduler is not None:
            preemption_point("guest_mmu: read the SPTE", "mmu")
        spte = sptes.get(gpa >> 12, 0)
        if spte & right:
            return spte
        why = 0
        if spte:
            why = _NOT_MEMORY if spte & SPTE_MMIO else PFERR_PRESENT_MASK
        if not kvm_mmu_page_fault(vcpu, gpa, code | why):
            return 0


def _refused(vcpu: KvmVcpu, found: PageFault | NonCanonical | EntryUnreadable) -> Refusal:
    if type(found) is PageFault:
        return GuestException(PF_VECTOR, found.error_code, found.gva)
    if type(found) is NonCanonical:
        return GuestException(GP_VECTOR, 0)
    return vcpu.refusal  # a table's own access was refused, and said why
