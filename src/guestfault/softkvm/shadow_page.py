"""Shadow pages: what the processor walks when it cannot walk the guest's own tables.

Without two-dimensional paging (``npt=0``, ``ept=0``) the processor knows one page table, and it has
to lead from linear addresses straight to host memory.  KVM builds it, one *shadow page*
(``struct kvm_mmu_page``) for each table of the guest and each way in which that table is used: a
page is found by the frame of the guest's table and its :class:`Role`.  A guest's large page, and a
guest without paging, have no table to shadow; the pages that stand for it are *direct*.

The *reverse map* leads back, from a guest frame to the entries that map it: what the host takes
away, or what is to be write-protected, is known by its frame.

A shadow page always has 512 entries of 8 bytes, whatever the guest's have: one of 32-bit paging,
with its 1024, is shadowed by several pages, which the role tells apart as *quadrants*.

Everything here is read and written with ``mmu_lock`` held, but for the processor's own look-ups:
whoever takes a right away must flush the TLBs afterwards, as with any page table.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from guestfault.softkvm.memslots import KvmMemorySlot
from guestfault.softkvm.refusal import GuestException
from guestfault.x86.access_kind import AccessKind
from guestfault.x86.entries import (
    PT64_NX_MASK,
    PT_PRESENT_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
)
from guestfault.x86.paging_state import PagingState
from guestfault.x86.registers import CR0_PE, CR0_PG, CR0_WP, CR4_SMAP, CR4_SMEP, EFER_NXE

__all__ = [
    "ACC_ALL",
    "ACC_EXEC_MASK",
    "ACC_USER_MASK",
    "ACC_WRITE_MASK",
    "SPTE_ADDRESS_MASK",
    "KvmMmu",
    "KvmMmuPage",
    "Role",
    "ShadowTable",
    "access_of_rights",
    "access_of_spte",
    "hardware_permissions",
    "make_spte",
    "mmio_access_bits",
    "spte_index",
]

ACC_EXEC_MASK: Final = 1
ACC_WRITE_MASK: Final = PT_WRITABLE_MASK
ACC_USER_MASK: Final = PT_USER_MASK
ACC_ALL: Final = ACC_EXEC_MASK | ACC_WRITE_MASK | ACC_USER_MASK

SPTE_ADDRESS_MASK: Final = (1 << 52) - (1 << 12)
"""The host address in an entry that maps a page."""


_NO_ENTRY: Final = 0, 0
_MMIO_EXEC_SHIFT: Final = 5


def access_of_rights(rights: int) -> int:
    """``ACC_*`` from the rights of a guest's walk (:attr:`~guestfault.x86.paging.Translation`)."""
    return rights & (ACC_WRITE_MASK | ACC_USER_MASK) | rights >> 63


def access_of_spte(spte: int) -> int:
    """``ACC_*`` that an entry grants."""
    return spte & (ACC_WRITE_MASK | ACC_USER_MASK) | (spte >> 63 ^ 1)


def spte_index(addr: int, level: int) -> int:
    """Which entry of a shadow page of this level an address goes through."""
    return addr >> 12 + (level - 1) * 9 & 511


class Role(NamedTuple):
    """``union kvm_mmu_page_role``: all that two uses of one guest table can differ in."""

    level: int
    direct: bool = False
    access: int = ACC_ALL
    """What the guest's entries on the way to the table permit; its own are less or equal."""
    has_4_byte_gpte: bool = False
    quadrant: int = 0
    # How the guest's registers make its entries read.
    efer_nx: bool = False
    cr0_wp: bool = False
    smep_andnot_wp: bool = False
    smap_andnot_wp: bool = False
    cr4_pse: bool = False


@dataclass(eq=False, slots=True)
class KvmMmuPage:
    """``struct kvm_mmu_page``.

    ``gfn`` is the guest table's, or the first that a direct page maps.  An entry either refers to
    another page (``children``) or maps a frame: then ``spt`` has it, a host address with the
    processor's own bits, together with its guest frame.  Both are found in one step, for the
    processor looks without the lock.
    """

    gfn: int
    role: Role
    spt: dict[int, tuple[int, int]] = field(default_factory=dict)
    children: dict[int, KvmMmuPage] = field(default_factory=dict)
    parents: set[tuple[KvmMmuPage, int]] = field(default_factory=set)
    slot: KvmMemorySlot | None = None
    """Of the guest's table: where its frame is write-tracked."""
    root_count: int = 0
    write_flooding_count: int = 0
    invalid: bool = False
    """Zapped.  A vCPU that has it for a root must load another."""


class ShadowTable:
    """The VM's shadow pages: ``active_mmu_pages``, ``mmu_page_hash`` and the reverse maps."""

    def __init__(self) -> None:
        self.active: dict[KvmMmuPage, None] = {}  # oldest first
        self.n_max_mmu_pages = 0
        """``KVM_SET_NR_MMU_PAGES``; 0 for what the size of the VM comes to."""
        self.must_flush = False
        """A right was taken away: whoever holds the lock has the TLBs flushed when it lets go."""
        self.flushing = 0
        """How many are at it: until then the guest may still write to its tables unnoticed."""
        self.gpte_seq = 0
        """Advances with each write to a table that has a shadow page, and when one has come to be
        so: what was read of the guest's tables before counts no more."""
        self._hash: dict[int, list[KvmMmuPage]] = {}
        self._rmaps: dict[int, dict[tuple[KvmMmuPage, int], None]] = {}

    # -- pages -------------------------------------------------------------------------------------

    def find(self, gfn: int, role: Role) -> KvmMmuPage | None:
        """``kvm_mmu_find_shadow_page``."""
        return next((sp for sp in self._hash.get(gfn, ()) if sp.role == role), None)

    def add(self, gfn: int, role: Role) -> KvmMmuPage:
        """A new page with no entries."""
        sp = KvmMmuPage(gfn, role)
        self.active[sp] = None
        self._hash.setdefault(gfn, []).append(sp)
        return sp

    def with_gptes(self, gfn: int) -> list[KvmMmuPage]:
        """``for_each_gfn_valid_sp_with_gptes``: the pages that shadow the table in this frame."""
        return [sp for sp in self._hash.get(gfn, ()) if not sp.role.direct]

    def remove(self, sp: KvmMmuPage) -> None:
        """Take a page out, with all that leads to it and from it."""
        for index in list(sp.children):
            self.unlink(sp, index)
        for index in list(sp.spt):
            self.drop_spte(sp, index)
        for parent, index in list(sp.parents):
            self.unlink(parent, index)
        del self.active[sp]
        pages = self._hash[sp.gfn]
        pages.remove(sp)
        if not pages:
            del self._hash[sp.gfn]
        sp.invalid = True

    def link(self, parent: KvmMmuPage, index: int, child: KvmMmuPage) -> None:
        """``link_shadow_page``: the entry refers to ``child``, and to a page of memory no more."""
        self.drop_spte(parent, index)
        self.unlink(parent, index)
        parent.children[index] = child
        child.parents.add((parent, index))

    def unlink(self, parent: KvmMmuPage, index: int) -> bool:
        """``drop_parent_pte``; whether there was a link."""
        child = parent.children.pop(index, None)
        if child is None:
            return False
        child.parents.discard((parent, index))
        return True

    # -- entries that map memory -------------------------------------------------------------------

    def set_spte(self, sp: KvmMmuPage, index: int, spte: int, gfn: int) -> None:
        """Write an entry and enter it in its frame's reverse map."""
        old = sp.spt.get(index)
        if old is not None and old[1] != gfn:
            self.drop_spte(sp, index)
        sp.spt[index] = spte, gfn
        self._rmaps.setdefault(gfn, {})[sp, index] = None

    def drop_spte(self, sp: KvmMmuPage, index: int) -> bool:
        """Clear an entry; whether there was one."""
        entry = sp.spt.pop(index, None)
        if entry is None:
            return False
        gfn = entry[1]
        rmap = self._rmaps[gfn]
        del rmap[sp, index]
        if not rmap:
            del self._rmaps[gfn]
        return True

    def unmap_gfns(self, gfns: range) -> bool:
        """``kvm_unmap_gfn_range``: clear what maps these frames; whether there was anything."""
        found = [entry for gfn in self._mapped(gfns) for entry in self._rmaps[gfn]]
        for sp, index in found:
            self.drop_spte(sp, index)
        return bool(found)

    def write_protect_gfns(self, gfns: range) -> bool:
        """``rmap_write_protect``: nobody writes to these frames; whether anybody could."""
        found = False
        for gfn in self._mapped(gfns):
            for sp, index in self._rmaps[gfn]:
                spte = sp.spt[index][0]
                if spte & PT_WRITABLE_MASK:
                    sp.spt[index] = spte & ~PT_WRITABLE_MASK, gfn
                    found = True
        return found

    def _mapped(self, gfns: range) -> Iterator[int]:
        if len(gfns) > len(self._rmaps):
            return iter([gfn for gfn in self._rmaps if gfn in gfns])
        return (gfn for gfn in gfns if gfn in self._rmaps)

    def entries(self) -> Iterator[tuple[KvmMmuPage, int, int]]:
        """Every entry that maps memory: (page, index, entry)."""
        for sp in self.active:
            for index, (spte, _) in sp.spt.items():
                yield sp, index, spte


class KvmMmu:
    """``struct kvm_mmu``: one vCPU's paging as it is now.  Its thread's own, but for the roots."""

    def __init__(self) -> None:
        self.paging: PagingState | None = None
        """The guest's registers that the rest was made for; other ones make it anew."""
        self.root_role = Role(2, direct=True)
        self.pdptrs: tuple[int, int, int, int] = 0, 0, 0, 0
        self.pdptrs_cr3: int | None = None
        self.roots: tuple[KvmMmuPage | None, ...] | None = None
        """One page; or four, one for each GiB; ``None`` in it where there is nothing to shadow."""
        self.must_reload = False
        """The roots are to be looked up again, although none was zapped."""
        self.permissions: tuple[int, ...] = ()
        self.fault_gpa: int | None = None
        """Where the guest's walk of the last fault ended; ``None`` if there was none."""
        self.injected: GuestException | None = None
        """What the last fault came to be for the guest."""

    def is_obsolete(self) -> bool:
        """Whether a root has been zapped, or none was loaded."""
        return (
            self.must_reload
            or self.roots is None
            or any(sp is not None and sp.invalid for sp in self.roots)
        )

    def root_of(self, addr: int) -> KvmMmuPage | None:
        """``shadow_walk_init``: the page that a walk to this address begins in."""
        roots = self.roots
        if not roots:
            return None
        return roots[0] if len(roots) == 1 else roots[addr >> 30 & 3]

    def look_up(self, addr: int) -> tuple[int, int]:
        """The processor's walk: (entry or 0, guest frame)."""
        sp = self.root_of(addr)
        while sp is not None:
            index = addr >> 3 + sp.role.level * 9 & 511
            child = sp.children.get(index)
            if child is None:
                return sp.spt.get(index, _NO_ENTRY)
            sp = child
        return _NO_ENTRY

    def permits(self, spte: int, kind: AccessKind, user: bool, ac: bool) -> bool:
        """Whether the processor lets an access through an entry."""
        if not spte & PT_PRESENT_MASK:
            return False
        return bool(self.permissions[kind | user << 2 | ac << 3] >> access_of_spte(spte) & 1)

    def permits_mmio(self, spte: int, kind: AccessKind, user: bool, ac: bool) -> bool:
        """Whether the guest's tables let it access a device: what emulation would check."""
        access = spte & (ACC_WRITE_MASK | ACC_USER_MASK) | spte >> _MMIO_EXEC_SHIFT & ACC_EXEC_MASK
        return bool(self.permissions[kind | user << 2 | ac << 3] >> access & 1)


def hardware_permissions(paging: PagingState) -> tuple[int, ...]:
    """Who may do what, as the processor has it while it runs on shadow pages.

    CR0.WP and EFER.NX are always on there.  SMEP and SMAP are the guest's own, but off while it has
    no paging, for then every page is a user's.
    """
    guards = paging.cr4 & (CR4_SMEP | CR4_SMAP) if paging.cr0 & CR0_PG else 0
    return PagingState(CR0_PE | CR0_PG | CR0_WP, 0, guards, EFER_NXE).permissions


def mmio_access_bits(access: int) -> int:
    """What an entry that says "no memory" keeps of the guest's rights, below its generation."""
    return access & (ACC_WRITE_MASK | ACC_USER_MASK) | (access & ACC_EXEC_MASK) << _MMIO_EXEC_SHIFT


def make_spte(hva: int, access: int) -> int:
    """A present entry for a host page with these ``ACC_*``."""
    nx = 0 if access & ACC_EXEC_MASK else PT64_NX_MASK
    return hva | PT_PRESENT_MASK | access & (ACC_WRITE_MASK | ACC_USER_MASK) | nx
