"""What the bits of a paging-structure entry mean, in each of the four paging modes.

Why it exists: the walk (:mod:`guestfault.x86.paging`) reads entries and the builder
(:mod:`guestfault.x86.tables`) writes them.  What both must agree on is here and nowhere else: how
many levels a mode has, which slice of the linear address indexes each, how wide an entry is, and
which of its bits are an address, a right, a flag, or reserved.

Levels are counted from the leaf, as everywhere in Linux: 1 is the page table (PT), 2 the page
directory (PD), 3 the page-directory-pointer table (PDPT), 4 the PML4 and 5 the PML5.

Sources: Intel SDM vol. 3 sections 4.3 (32-bit), 4.4 (PAE), 4.5 (4-level and 5-level) with tables
4-4 to 4-20; AMD APM vol. 2 sections 5.2 and 5.3.  The names of the bits are those of KVM's
``mmu.h``.
"""

from __future__ import annotations

import enum
from functools import lru_cache
from typing import Final, NamedTuple

__all__ = [
    "ADDRESS_MASK",
    "PT64_NX_MASK",
    "PT_ACCESSED_MASK",
    "PT_DIRTY_MASK",
    "PT_GLOBAL_MASK",
    "PT_PAGE_SIZE_MASK",
    "PT_PCD_MASK",
    "PT_PRESENT_MASK",
    "PT_PWT_MASK",
    "PT_USER_MASK",
    "PT_WRITABLE_MASK",
    "SIZE_1G",
    "SIZE_2M",
    "SIZE_4K",
    "SIZE_4M",
    "LevelFormat",
    "PagingMode",
    "level_formats",
    "pse36_base",
    "pse36_entry",
]

PT_PRESENT_MASK: Final = 1 << 0
PT_WRITABLE_MASK: Final = 1 << 1
PT_USER_MASK: Final = 1 << 2
PT_PWT_MASK: Final = 1 << 3
PT_PCD_MASK: Final = 1 << 4
PT_ACCESSED_MASK: Final = 1 << 5
PT_DIRTY_MASK: Final = 1 << 6
PT_PAGE_SIZE_MASK: Final = 1 << 7  # in a level-1 entry this bit is PAT
PT_GLOBAL_MASK: Final = 1 << 8
PT64_NX_MASK: Final = 1 << 63

ADDRESS_MASK: Final = 0x000F_FFFF_FFFF_F000
"""The physical address in any entry, whatever its width: bits 51:12."""

SIZE_4K: Final = 1 << 12
SIZE_2M: Final = 1 << 21
SIZE_4M: Final = 1 << 22
SIZE_1G: Final = 1 << 30

_PSE36_HIGH: Final = 0x001F_E000  # bits 20:13 of a 4 MiB entry: the page's address bits 39:32
_PSE36_SHIFT: Final = 32 - 13


class PagingMode(enum.Enum):
    """How the processor translates linear addresses (SDM vol. 3 table 4-1)."""

    NONE = "none"
    BITS32 = "32-bit"
    PAE = "PAE"
    FOUR_LEVEL = "4-level"
    FIVE_LEVEL = "5-level"

    @property
    def levels(self) -> int:
        """The number of levels, and so the level of the root; 0 without paging."""
        return _GEOMETRY[self].levels

    @property
    def entry_size(self) -> int:
        """Bytes in an entry: 4 or 8; 0 without paging."""
        return _GEOMETRY[self].entry_size

    @property
    def linear_bits(self) -> int:
        """Width of a linear address: 32, 48 or 57."""
        return _GEOMETRY[self].linear_bits

    @property
    def page_sizes(self) -> tuple[int, ...]:
        """Every page size the mode can have, in bytes, smallest first."""
        return _GEOMETRY[self].page_sizes

    def shift(self, level: int) -> int:
        """The lowest address bit that indexes ``level``; its entries map ``1 << shift`` bytes."""
        return 12 + (level - 1) * _GEOMETRY[self].index_bits

    @property
    def index_mask(self) -> int:
        """The entries of a full table, less one."""
        return (1 << _GEOMETRY[self].index_bits) - 1


class _Geometry(NamedTuple):
    levels: int
    entry_size: int
    index_bits: int
    linear_bits: int
    page_sizes: tuple[int, ...]


_GEOMETRY: Final = {
    PagingMode.NONE: _Geometry(0, 0, 0, 32, ()),
    PagingMode.BITS32: _Geometry(2, 4, 10, 32, (SIZE_4K, SIZE_4M)),
    # Two bits of a PAE address are left for the PDPT, which has four entries.
    PagingMode.PAE: _Geometry(3, 8, 9, 32, (SIZE_4K, SIZE_2M)),
    PagingMode.FOUR_LEVEL: _Geometry(4, 8, 9, 48, (SIZE_4K, SIZE_2M, SIZE_1G)),
    PagingMode.FIVE_LEVEL: _Geometry(5, 8, 9, 57, (SIZE_4K, SIZE_2M, SIZE_1G)),
}


class LevelFormat(NamedTuple):
    """How to read a *present* entry of one level, as masks over its value."""

    shift: int
    """An entry maps ``1 << shift`` bytes of linear addresses."""
    leaf: int
    """The bit that says the entry maps a page: PS; P where every entry does; 0 where none can."""
    reserved_leaf: int
    """Bits that must be 0 in an entry that maps a page."""
    reserved_table: int
    """Bits that must be 0 in an entry that refers to a table."""
    granted: int
    """Rights that the entry gives without having bits for them (R/W and U/S in a PAE PDPTE)."""
    accessed: int
    """The accessed flag, or 0 where the level has none."""


def _bits(low: int, high: int) -> int:
    """The mask of bits ``high:low``, both included; 0 if there are none."""
    return (1 << (high + 1)) - (1 << low) if high >= low else 0


@lru_cache(maxsize=64)
def level_formats(
    mode: PagingMode, maxphyaddr: int, *, nxe: bool, pse: bool, gbpages: bool
) -> tuple[LevelFormat, ...]:
    """The entry format of every level of ``mode``, indexed by level (0 is a placeholder).

    ``maxphyaddr`` is the width of a physical address in bits (32 to 52), ``nxe`` is EFER.NXE,
    ``pse`` CR4.PSE (it matters to 32-bit paging only), ``gbpages`` whether CPUID offers 1 GiB
    pages.
    """
    ad = PT_ACCESSED_MASK
    ps = PT_PAGE_SIZE_MASK
    no_entry = LevelFormat(0, 0, 0, 0, 0, 0)
    if mode is PagingMode.NONE:
        return (no_entry,)
    if mode is PagingMode.BITS32:
        # PSE-36: address bits that the processor does not have are reserved, and so is bit 21.
        large = _bits(min(40, maxphyaddr) - 32 + 13, 21)
        return (
            no_entry,
            LevelFormat(12, PT_PRESENT_MASK, 0, 0, 0, ad),
            LevelFormat(22, ps if pse else 0, large, 0, 0, ad),
        )

    # Bits 62:52 are for software in 4-level and 5-level entries, and reserved in PAE's.
    beyond = _bits(maxphyaddr, 62 if mode is PagingMode.PAE else 51)
    if not nxe:
        beyond |= PT64_NX_MASK
    formats = [
        no_entry,
        LevelFormat(12, PT_PRESENT_MASK, beyond, 0, 0, ad),
        LevelFormat(21, ps, beyond | _bits(13, 20), beyond, 0, ad),
    ]
    if mode is PagingMode.PAE:
        always = _bits(1, 2) | _bits(5, 8) | _bits(maxphyaddr, 63)
        formats.append(LevelFormat(30, 0, 0, always, PT_WRITABLE_MASK | PT_USER_MASK, 0))
        return tuple(formats)
    if gbpages:
        formats.append(LevelFormat(30, ps, beyond | _bits(13, 29), beyond, 0, ad))
    else:
        formats.append(LevelFormat(30, 0, 0, beyond | ps, 0, ad))
    formats.extend(
        LevelFormat(mode.shift(level), 0, 0, beyond | ps, 0, ad)
        for level in range(4, mode.levels + 1)
    )
    return tuple(formats)


def pse36_base(entry: int) -> int:
    """The 4 MiB page that a 32-bit page-directory entry maps, an address of up to 40 bits."""
    return (entry & 0xFFC0_0000) | (entry & _PSE36_HIGH) << _PSE36_SHIFT


def pse36_entry(base: int) -> int:
    """The address bits of a page-directory entry that maps the 4 MiB page at ``base`` (< 2**40)."""
    return (base & 0xFFC0_0000) | (base >> _PSE36_SHIFT & _PSE36_HIGH)
