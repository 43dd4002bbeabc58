"""Page tables for a guest, built outside it.

Why it exists: a small guest that starts in protected or long mode needs tables before its first
instruction, and a test of the walk needs tables that it knows by construction.

A :class:`TableBuilder` lays tables out one after another from a guest physical address and keeps
them as bytes.  It does not touch guest memory: the caller puts :meth:`TableBuilder.image` at
:attr:`TableBuilder.first_table` and the registers of :attr:`TableBuilder.state` into the vCPU.

>>> tables = TableBuilder(PagingMode.FOUR_LEVEL, first_table=0x10_0000)
>>> tables.map(Mapping(gva=0, gpa=0, length=SIZE_1G, page_size=SIZE_2M))
>>> tables.map(Mapping(gva=SIZE_1G, gpa=0x8000, length=0x2000, user=True, writable=False))
>>> tables.table_pages, hex(tables.cr3)
(5, '0x100000')

Entries that refer to tables grant every right, so that the page's own entry decides alone.
Accessed and dirty flags are set from the start unless asked otherwise: the processor then has no
reason to write to the tables, and a fault on a table page is a read.

Sources: those of :mod:`guestfault.x86.entries`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from guestfault.errors import GuestfaultError
from guestfault.x86.entries import (
    ADDRESS_MASK,
    PT64_NX_MASK,
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_PAGE_SIZE_MASK,
    PT_PRESENT_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
    SIZE_1G,
    SIZE_2M,
    SIZE_4K,
    SIZE_4M,
    PagingMode,
    pse36_entry,
)
from guestfault.x86.paging import PagingState
from guestfault.x86.registers import (
    CR0_ET,
    CR0_NE,
    CR0_PE,
    CR0_PG,
    CR0_WP,
    CR4_LA57,
    CR4_PAE,
    CR4_PSE,
    EFER_LMA,
    EFER_LME,
    EFER_NXE,
)

__all__ = [
    "SIZE_1G",
    "SIZE_2M",
    "SIZE_4K",
    "SIZE_4M",
    "Mapping",
    "MappingError",
    "PagingMode",
    "TableBuilder",
    "table_pages_needed",
]

_LONG_MODE: Final = EFER_LME | EFER_LMA | EFER_NXE
_CR4_EFER: Final = {
    PagingMode.BITS32: (CR4_PSE, 0),
    PagingMode.PAE: (CR4_PAE, EFER_NXE),
    PagingMode.FOUR_LEVEL: (CR4_PAE, _LONG_MODE),
    PagingMode.FIVE_LEVEL: (CR4_PAE | CR4_LA57, _LONG_MODE),
}


@dataclass(frozen=True)
class Mapping:
    """``length`` bytes of linear addresses from ``gva``, mapped to guest physical ones from
    ``gpa``.

    All three are multiples of ``page_size``, one of the sizes the paging mode has.
    """

    gva: int
    gpa: int
    length: int
    page_size: int = SIZE_4K
    writable: bool = True
    user: bool = False
    executable: bool = True

    def __str__(self) -> str:
        return f"{self.length:#x} bytes at gva {self.gva:#x} to gpa {self.gpa:#x}"


class MappingError(GuestfaultError):
    """A mapping that the paging mode cannot express, or that overlaps an earlier one.

    ``mapping`` is the one at fault and ``why`` the reason.  A builder that raised it while writing
    entries may hold part of the mapping: make a new one.
    """

    def __init__(self, mapping: Mapping, why: str) -> None:
        self.mapping = mapping
        self.why = why
        super().__init__(f"cannot map {mapping}: {why}")


class TableBuilder:
    """Page tables of one paging mode, which grow page by page from ``first_table``.

    ``first_table`` is a guest physical address, a multiple of 4096, and becomes the root; it must
    leave the tables below 4 GiB in 32-bit and PAE paging.  ``accessed`` and ``dirty`` say whether
    entries have those flags set.
    """

    def __init__(
        self, mode: PagingMode, first_table: int, *, accessed: bool = True, dirty: bool = True
    ) -> None:
        if mode is PagingMode.NONE:
            raise ValueError("there are no tables without paging")
        if first_table % SIZE_4K or not 0 <= first_table < _table_limit(mode):
            raise ValueError(f"no table can lie at gpa {first_table:#x}")
        self.mode = mode
        self.first_table = first_table
        self._accessed = PT_ACCESSED_MASK if accessed else 0
        self._dirty = PT_DIRTY_MASK if dirty else 0
        self._entry_code = "I" if mode.entry_size == 4 else "Q"
        self._memory = bytearray(SIZE_4K)

    @property
    def cr3(self) -> int:
        """The value of CR3: the address of the root."""
        return self.first_table

    @property
    def table_pages(self) -> int:
        """Pages in use; the tables end at ``first_table + 4096 * table_pages``."""
        return len(self._memory) // SIZE_4K

    @property
    def state(self) -> PagingState:
        """The registers under which a processor uses the tables, with CR0.WP and, where it exists,
        NX.

        The bits that the mode needs and no more: or further ones (``CR4_SMEP``) in.
        """
        cr4, efer = _CR4_EFER[self.mode]
        return PagingState(CR0_PE | CR0_ET | CR0_NE | CR0_WP | CR0_PG, self.cr3, cr4, efer)

    def image(self) -> bytes:
        """The tables, to be stored in guest memory at :attr:`first_table`."""
        return bytes(self._memory)

    def read_entry(self, gpa: int, size: int) -> int | None:
        """The entry at ``gpa``, or ``None`` outside the tables: what a walk reads them with."""
        offset = gpa - self.first_table
        if not 0 <= offset <= len(self._memory) - size:
            return None
        return int.from_bytes(self._memory[offset : offset + size], "little")

    def map(self, mapping: Mapping) -> None:
        """Add a mapping; raises :class:`MappingError` if that cannot be done."""
        level = _leaf_level(self.mode, mapping)
        flags = PT_PRESENT_MASK | self._accessed | self._dirty
        if mapping.writable:
            flags |= PT_WRITABLE_MASK
        if mapping.user:
            flags |= PT_USER_MASK
        if not mapping.executable:
            flags |= PT64_NX_MASK
        if level > 1:
            flags |= PT_PAGE_SIZE_MASK

        gva, gpa, left = mapping.gva, mapping.gpa, mapping.length >> self.mode.shift(level)
        while left:
            table = self._table(level, gva, mapping)
            index = gva >> self.mode.shift(level) & self.mode.index_mask
            count = min(left, self.mode.index_mask + 1 - index)
            size = count * mapping.page_size
            pages = range(gpa, gpa + size, mapping.page_size)
            entries = [flags | _address_bits(self.mode, level, page) for page in pages]
            self._fill(table, index, entries, mapping)
            gva, gpa, left = gva + size, gpa + size, left - count

    def _table(self, level: int, gva: int, mapping: Mapping) -> int:
        """The gpa of the table of ``level`` that serves ``gva``, allocated if need be."""
        if level == self.mode.levels:
            return self.first_table
        parent = self._table(level + 1, gva, mapping)
        index = gva >> self.mode.shift(level + 1) & self.mode.index_mask
        entry = self.read_entry(parent + index * self.mode.entry_size, self.mode.entry_size)
        if entry:
            if entry & PT_PAGE_SIZE_MASK:
                raise MappingError(mapping, f"gva {gva:#x} lies in a large page already mapped")
            return entry & ADDRESS_MASK
        table = self.first_table + len(self._memory)
        if table >= _table_limit(self.mode):
            raise MappingError(mapping, f"its tables would reach gpa {table:#x}")
        self._memory.extend(bytes(SIZE_4K))
        # A PDPTE of PAE paging has no rights and no accessed flag: those bits are reserved.
        flags = PT_PRESENT_MASK
        if not (self.mode is PagingMode.PAE and level + 1 == self.mode.levels):
            flags |= PT_WRITABLE_MASK | PT_USER_MASK | self._accessed
        self._fill(parent, index, [table | flags], mapping)
        return table

    def _fill(self, table: int, index: int, entries: list[int], mapping: Mapping) -> None:
        """Store ``entries`` in ``table`` from ``index`` on, where nothing may be yet."""
        start = table - self.first_table + index * self.mode.entry_size
        end = start + len(entries) * self.mode.entry_size
        if any(self._memory[start:end]):
            raise MappingError(mapping, "it overlaps an earlier mapping")
        self._memory[start:end] = struct.pack(f"<{len(entries)}{self._entry_code}", *entries)


def table_pages_needed(mode: PagingMode, mappings: Iterable[Mapping]) -> int:
    """The pages that a :class:`TableBuilder` will use for ``mappings``, its root included.

    >>> table_pages_needed(PagingMode.FOUR_LEVEL, [Mapping(0, 0, SIZE_1G, page_size=SIZE_2M)])
    3
    """
    tables: set[tuple[int, int]] = set()
    for mapping in mappings:
        last = mapping.gva + mapping.length - 1
        for level in range(_leaf_level(mode, mapping), mode.levels):
            shift = mode.shift(level + 1)
            tables.update((level, n) for n in range(mapping.gva >> shift, (last >> shift) + 1))
    return 1 + len(tables)


def _table_limit(mode: PagingMode) -> int:
    """The end of the guest physical addresses where tables of ``mode`` may lie.

    PAE could place all but its root higher; a contiguous run of tables cannot.
    """
    return 1 << (32 if mode.linear_bits == 32 else 52)


def _address_bits(mode: PagingMode, level: int, page: int) -> int:
    """``page`` as the address in an entry that maps it."""
    return pse36_entry(page) if mode is PagingMode.BITS32 and level == 2 else page


def _leaf_level(mode: PagingMode, mapping: Mapping) -> int:
    """The level whose entries map pages of this size, once the mapping is known to be sound."""
    size = mapping.page_size
    if size not in mode.page_sizes:
        sizes = ", ".join(f"{size:#x}" for size in mode.page_sizes)
        raise MappingError(
            mapping, f"{mode.value} paging has pages of {sizes} bytes, not {size:#x}"
        )
    if mapping.gva % size or mapping.gpa % size or mapping.length % size or mapping.length <= 0:
        raise MappingError(mapping, f"not a whole number of aligned pages of {size:#x} bytes")
    if not mapping.executable and mode is PagingMode.BITS32:
        raise MappingError(mapping, "32-bit paging has no execute-disable bit; use PAE")
    if not _is_linear_range(mode.linear_bits, mapping.gva, mapping.length):
        raise MappingError(mapping, f"not a range of linear addresses in {mode.value} paging")
    level = mode.page_sizes.index(size) + 1
    width = 52 if mode.entry_size == 8 else 40 if level == 2 else 32
    if not 0 <= mapping.gpa <= (1 << width) - mapping.length:
        raise MappingError(mapping, f"an entry for such a page holds an address of {width} bits")
    return level


def _is_linear_range(bits: int, gva: int, length: int) -> bool:
    """Whether the whole range is in the address space, and (in long mode) canonical."""
    if bits == 32:
        return 0 <= gva <= (1 << 32) - length
    half = 1 << bits - 1
    return 0 <= gva <= half - length or (1 << 64) - half <= gva <= (1 << 64) - length
