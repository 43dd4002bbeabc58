"""The guest page walk: from a linear address to a guest physical one, as the processor does it.

Why it exists: the software processor has no MMU but this one, and naming the access behind a bare
-EFAULT means repeating the guest's translations from outside, when the guest has stopped.  Both ask
for millions of walks, both must know every table entry a walk touched (an entry in an absent page
is a faulting access of its own), and neither may write to guest memory on the way.

:func:`walk` gives one of four results, to be told apart with ``match``:

* :class:`Translation`: the access may go ahead, to this guest physical address;
* :class:`PageFault`: the processor would raise #PF with this error code;
* :class:`NonCanonical`: it would raise #GP (or #SS for a stack access), and not walk at all;
* :class:`EntryUnreadable`: the walk needs a table entry that ``read_entry`` could not give.

Order matters and is the manual's: at each level first presence, then reserved bits, and the rights
of all levels together only when the walk has reached a page.  An access that crosses a page is two
walks.

The walk writes nothing.  A translation lists the accessed and dirty flags that the processor would
set as ``updates``; a fault lists none, although a processor may set accessed flags on the way to a
fault.

Walks of neighbouring pages share all but their last entry.  A caller may keep
:attr:`Translation.table`, the table in which the walk ended together with the rights gathered above
it, and start the next walk there with :func:`walk_from`, as processors do with their
paging-structure caches - and must forget it when they do (a write to CR3, ``INVLPG``).

Where vendors differ in reserved bits, Intel's rules hold.  Not modelled: protection keys, shadow
stacks, linear-address masking, encryption bits.

Sources: Intel SDM vol. 3 sections 4.1 to 4.8 and 4.10.3; AMD APM vol. 2 chapter 5.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, NamedTuple, TypeAlias

from guestfault.x86.entries import (
    ADDRESS_MASK,
    PT64_NX_MASK,
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_PRESENT_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
    PagingMode,
    pse36_base,
)
from guestfault.x86.paging_state import ALL_RIGHTS, AccessKind, PagingState, Table
from guestfault.x86.registers import (
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)

__all__ = [
    "AccessKind",
    "Entry",
    "EntryUnreadable",
    "EntryUpdate",
    "NonCanonical",
    "PageFault",
    "PagingMode",
    "PagingState",
    "ReadEntry",
    "Table",
    "Translation",
    "WalkResult",
    "walk",
    "walk_from",
]

ReadEntry: TypeAlias = Callable[[int, int], int | None]
"""``read_entry(gpa, size)``: the entry of 4 or 8 bytes there, or ``None`` if it is unreadable."""

Entry: TypeAlias = tuple[int, int, int]
"""An entry that a walk read: (gpa of the entry, its value, its level)."""

EntryUpdate: TypeAlias = tuple[int, int, int]
"""An entry that the processor would write: (gpa of the entry, its new value, 4 or 8 bytes)."""

_LINEAR_MASK: Final = (1 << 64) - 1
_WRITE: Final = int(AccessKind.WRITE)
_FETCH: Final = int(AccessKind.FETCH)


class Translation(NamedTuple):
    """The access may go ahead."""

    gpa: int
    """Where, to the byte."""
    page_size: int
    """Of the guest's page, in bytes; ``1 << 32`` without paging."""
    rights: int
    """R/W, U/S and not-NX along the whole walk; for :meth:`PagingState.permits`."""
    dirty: bool
    """The page's dirty flag once ``updates`` are made; while clear, a write must walk again."""
    entries: tuple[Entry, ...]
    """The entries read, from the root (or where :func:`walk_from` began) to the page's own."""
    updates: tuple[EntryUpdate, ...]
    """The entries whose accessed or dirty flag the processor would set, usually none."""
    table: Table | None
    """The table of the last entry, to start from next time; ``None`` without paging."""

    @property
    def writable(self) -> bool:
        """R/W is set at every level.  Without CR0.WP, supervisor writes do not need it."""
        return self.rights & PT_WRITABLE_MASK != 0

    @property
    def user(self) -> bool:
        """U/S is set at every level: a user-mode address."""
        return self.rights & PT_USER_MASK != 0

    @property
    def executable(self) -> bool:
        """NX is set at no level.  SMEP still keeps a supervisor from fetching from a user page."""
        return self.rights & PT64_NX_MASK != 0


class PageFault(NamedTuple):
    """The processor would raise #PF."""

    gva: int
    """The address, for CR2."""
    error_code: int
    """As pushed on the stack: ``PFERR_*_MASK`` of :mod:`guestfault.x86.registers`."""
    level: int
    """The level of the entry that ended the walk."""
    entries: tuple[Entry, ...]
    """The entries read, the offending one last (for missing rights: the page's own)."""


class NonCanonical(NamedTuple):
    """The processor would raise #GP(0), or #SS(0) for an access through SS, without a walk."""

    gva: int


class EntryUnreadable(NamedTuple):
    """``read_entry`` returned ``None``: the page that holds the entry is itself absent."""

    entry_gpa: int
    level: int
    size: int
    entries: tuple[Entry, ...]
    """The entries read before."""


WalkResult: TypeAlias = Translation | PageFault | NonCanonical | EntryUnreadable


def walk(
    state: PagingState,
    gva: int,
    kind: AccessKind,
    user: bool,
    read_entry: ReadEntry,
    *,
    ac: bool = False,
    implicit: bool = False,
) -> WalkResult:
    """Translate ``gva`` for one access, from CR3.

    ``user`` is whether it is made at CPL 3.  ``ac`` is RFLAGS.AC, which lifts SMAP below CPL 3.
    ``implicit`` marks what the processor reads or writes for itself (GDT, LDT, IDT, TSS): a
    supervisor-mode access at any CPL, which AC does not help.  Outside long mode the upper half of
    ``gva`` is ignored.
    """
    bits = state.linear_bits
    if bits == 32:
        gva &= 0xFFFF_FFFF
        mode = state.mode
        if mode is PagingMode.NONE:
            return Translation(gva, 1 << 32, ALL_RIGHTS, True, (), (), None)
        if mode is PagingMode.PAE and state.pdptes is not None:
            # Their reserved bits were checked when CR3 was loaded.
            pdpte = state.pdptes[gva >> 30]
            if not pdpte & PT_PRESENT_MASK:
                return _fault(state, gva, kind, user and not implicit, 0, 3, [])
            table = Table(2, pdpte & ADDRESS_MASK)
            return walk_from(state, table, gva, kind, user, read_entry, ac=ac, implicit=implicit)
    # Adding half the range folds the two canonical halves into one that starts at 0.
    elif (gva + (1 << bits - 1) & _LINEAR_MASK) >> bits:
        return NonCanonical(gva)
    return walk_from(state, state.root, gva, kind, user, read_entry, ac=ac, implicit=implicit)


def walk_from(
    state: PagingState,
    table: Table,
    gva: int,
    kind: AccessKind,
    user: bool,
    read_entry: ReadEntry,
    *,
    ac: bool = False,
    implicit: bool = False,
) -> WalkResult:
    """Translate ``gva`` starting at ``table``, which an earlier walk found on the way to its page.

    A :attr:`Translation.table` serves all addresses that agree with that walk's above the bits that
    index it: for one of level ``n``, those with the same ``gva >> state.mode.shift(n + 1)``.
    ``gva`` must be canonical, and must be 32 bits wide outside long mode.  Everything else is as in
    :func:`walk`, except that entries above ``table`` are neither read nor listed.
    """
    if implicit:
        user = ac = False
    level, base, rights = table
    formats = state.formats
    size = state.entry_size
    index_mask = 511 if size == 8 else 1023
    entries: list[Entry] = []
    updates: list[EntryUpdate] = []
    while True:
        shift, leaf, reserved_leaf, reserved_table, granted, flags = formats[level]
        entry_gpa = base + (gva >> shift & index_mask) * size
        entry = read_entry(entry_gpa, size)
        if entry is None:
            return EntryUnreadable(entry_gpa, level, size, tuple(entries))
        entries.append((entry_gpa, entry, level))
        if not entry & PT_PRESENT_MASK:
            return _fault(state, gva, kind, user, 0, level, entries)
        if entry & leaf:
            break
        if entry & reserved_table:
            code = PFERR_PRESENT_MASK | PFERR_RSVD_MASK
            return _fault(state, gva, kind, user, code, level, entries)
        rights &= entry ^ PT64_NX_MASK | granted
        if entry & flags != flags:
            updates.append((entry_gpa, entry | flags, size))
        base = entry & ADDRESS_MASK
        level -= 1

    if entry & reserved_leaf:
        code = PFERR_PRESENT_MASK | PFERR_RSVD_MASK
        return _fault(state, gva, kind, user, code, level, entries)
    ended_in = Table(level, base, rights)
    rights &= entry ^ PT64_NX_MASK
    permitted = state.permissions[kind | user << 2 | ac << 3]
    if not permitted >> (rights & 6 | rights >> 63) & 1:
        return _fault(state, gva, kind, user, PFERR_PRESENT_MASK, level, entries)

    if kind & _WRITE:
        flags = PT_ACCESSED_MASK | PT_DIRTY_MASK
    if entry & flags != flags:
        updates.append((entry_gpa, entry | flags, size))
    page_size = 1 << shift
    offset = page_size - 1
    page = pse36_base(entry) if shift == 22 else entry & ADDRESS_MASK & ~offset
    return Translation(
        page | gva & offset,
        page_size,
        rights,
        (entry | flags) & PT_DIRTY_MASK != 0,
        tuple(entries),
        tuple(updates),
        ended_in,
    )


def _fault(
    state: PagingState,
    gva: int,
    kind: AccessKind,
    user: bool,
    code: int,
    level: int,
    entries: list[Entry],
) -> PageFault:
    """``code`` says what was wrong with the entry; the access itself makes up the rest."""
    if kind & _WRITE:
        code |= PFERR_WRITE_MASK
    elif kind == _FETCH and state.reports_fetch:
        code |= PFERR_FETCH_MASK
    if user:
        code |= PFERR_USER_MASK
    return PageFault(gva, code, level, tuple(entries))
