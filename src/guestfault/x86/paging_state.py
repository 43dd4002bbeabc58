"""What the registers decide about paging, before any table is read.

Why it exists: a walk happens millions of times, the control registers change rarely.  A
:class:`PagingState` turns them once into what a walk needs: the mode and the root, the format of
each level's entries, and who may do what with which rights.

Sources: Intel SDM vol. 3 sections 4.1 (modes), 4.5 (CR3), 4.6 (rights) and 4.7 (error codes).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Final, NamedTuple

from guestfault.x86.access_kind import AccessKind
from guestfault.x86.entries import (
    ADDRESS_MASK,
    PT64_NX_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
    LevelFormat,
    PagingMode,
    level_formats,
)
from guestfault.x86.registers import (
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    CR4_SMAP,
    CR4_SMEP,
    EFER_LMA,
    EFER_NXE,
)

__all__ = ["ALL_RIGHTS", "AccessKind", "PagingState", "Table"]

# Rights are kept in the entry's own bits, with NX turned round so that a set bit always permits,
# and the rights along a walk are a plain AND.
ALL_RIGHTS: Final = PT_WRITABLE_MASK | PT_USER_MASK | PT64_NX_MASK
"""What a walk starts with: R/W, U/S and not-NX."""


_READ: Final = int(AccessKind.READ)
_WRITE: Final = int(AccessKind.WRITE)
_FETCH: Final = int(AccessKind.FETCH)


class Table(NamedTuple):
    """A place to start a walk: a paging structure, and the rights gathered on the way to it."""

    level: int
    gpa: int
    rights: int = ALL_RIGHTS


@dataclass(frozen=True)
class PagingState:
    """The registers that decide a walk, as in ``kvm_sregs``.

    ``maxphyaddr`` is the guest's CPUID.80000008H:EAX[7:0]; at 52, the default, no address bit is
    reserved.  ``gbpages`` is its CPUID.80000001H:EDX[26].  ``pdptes`` are the four PAE
    page-directory-pointer-table registers (``kvm_sregs2.pdptrs``), which the processor loads with
    CR3; without them the walk reads the entries from memory at CR3, as AMD's nested paging does.

    Long mode is EFER.LMA, not LME.  Cheap to make, and cheaper to keep: what follows from the
    registers is worked out once per object.

    >>> PagingState(cr0=0x8001_0001, cr3=0x1000, cr4=0x20, efer=0xd00).mode
    <PagingMode.FOUR_LEVEL: '4-level'>
    """

    cr0: int
    cr3: int
    cr4: int
    efer: int
    maxphyaddr: int = 52
    gbpages: bool = True
    pdptes: tuple[int, int, int, int] | None = None

    @cached_property
    def mode(self) -> PagingMode:
        """How linear addresses are translated."""
        if not self.cr0 & CR0_PG:
            return PagingMode.NONE
        if not self.cr4 & CR4_PAE:
            return PagingMode.BITS32
        if not self.efer & EFER_LMA:
            return PagingMode.PAE
        return PagingMode.FIVE_LEVEL if self.cr4 & CR4_LA57 else PagingMode.FOUR_LEVEL

    @cached_property
    def root(self) -> Table:
        """The table that CR3 refers to, where a walk starts."""
        mode = self.mode
        if mode is PagingMode.BITS32:
            return Table(2, self.cr3 & 0xFFFF_F000)
        if mode is PagingMode.PAE:
            return Table(3, self.cr3 & 0xFFFF_FFE0)
        return Table(mode.levels, self.cr3 & ADDRESS_MASK & ((1 << self.maxphyaddr) - 1))

    @cached_property
    def linear_bits(self) -> int:
        """Width of a linear address: 32, 48 or 57."""
        return self.mode.linear_bits

    @cached_property
    def entry_size(self) -> int:
        """Bytes in an entry: 4 or 8; 0 without paging."""
        return self.mode.entry_size

    @cached_property
    def formats(self) -> tuple[LevelFormat, ...]:
        """The entry format of each level, indexed by level."""
        return level_formats(
            self.mode,
            self.maxphyaddr,
            nxe=bool(self.efer & EFER_NXE),
            pse=bool(self.cr4 & CR4_PSE),
            gbpages=self.gbpages,
        )

    @cached_property
    def permissions(self) -> tuple[int, ...]:
        """Which accesses which rights permit; see :func:`_permissions`."""
        return _permissions(
            bool(self.cr0 & CR0_WP), bool(self.cr4 & CR4_SMEP), bool(self.cr4 & CR4_SMAP)
        )

    @cached_property
    def reports_fetch(self) -> bool:
        """Whether a page fault on a fetch says so in its error code (SDM section 4.7)."""
        nx = self.cr4 & CR4_PAE and self.efer & EFER_NXE
        return bool(nx or self.cr4 & CR4_SMEP)

    def permits(self, rights: int, kind: AccessKind, user: bool, *, ac: bool = False) -> bool:
        """Whether a page with these rights (:attr:`Translation.rights`) allows another access."""
        return bool(self.permissions[kind | user << 2 | ac << 3] >> (rights & 6 | rights >> 63) & 1)


@lru_cache(maxsize=8)
def _permissions(wp: bool, smep: bool, smap: bool) -> tuple[int, ...]:
    """Who may do what: the rules of SDM section 4.6.1, worked out for every case.

    Indexed by ``kind | user << 2 | ac << 3``.  Each item is a set of bits, indexed by
    ``U/S << 2 | R/W << 1 | X``; a set bit permits.
    """

    def permits(
        kind: int, user: bool, ac: bool, user_page: bool, write: bool, execute: bool
    ) -> bool:
        if user:
            return user_page and (kind == _READ or (write if kind == _WRITE else execute))
        if kind == _FETCH:
            return execute and not (smep and user_page)
        if smap and user_page and not ac:
            return False
        return kind == _READ or write or not wp

    return tuple(
        sum(
            permits(kind, user, ac, bool(rights & 4), bool(rights & 2), bool(rights & 1)) << rights
            for rights in range(8)
        )
        for ac in (False, True)
        for user in (False, True)
        for kind in (_READ, _WRITE, _FETCH, _WRITE)  # the last is a read-modify-write
    )
