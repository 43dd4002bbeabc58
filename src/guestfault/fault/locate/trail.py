"""The accesses of one stopped vCPU, followed down to guest physical memory.

What an instruction accesses is known by linear address (:mod:`guestfault.x86.accesses`).  The
processor reaches each page of it through the guest's own page tables, whose entries are guest
memory as well: a :class:`Trail` walks for every page of every access, as the processor does, and
writes down each thing touched, table entries included, in the order of touching.  It ends where the
processor gets no further: where the guest itself would take an exception, or where the content that
decides how it goes on is not there.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from typing import NamedTuple

from guestfault.fault.locate.host_view import GuestMemory
from guestfault.x86.access_kind import AccessKind
from guestfault.x86.entries import PT64_NX_MASK
from guestfault.x86.memory_access import MemoryAccess, Role
from guestfault.x86.paging import (
    Entry,
    EntryUnreadable,
    EntryUpdate,
    PageFault,
    PagingMode,
    PagingState,
    Table,
    Translation,
    WalkResult,
    walk,
    walk_from,
)
from guestfault.x86.paging_state import ALL_RIGHTS
from guestfault.x86.registers import GP_VECTOR, PF_VECTOR, SS_VECTOR, X86_EFLAGS_AC
from guestfault.x86.state import CpuState

__all__ = ["Step", "Trail"]

_READ, _READ_WRITE = AccessKind.READ, AccessKind.READ_WRITE
_OFFSET = 4095
_INDEX_BITS = 9
_LONG_MODE_LEVELS = 4


class Step(NamedTuple):
    """One thing touched.  ``gpa`` is ``None`` if its address cannot be known.

    ``gva`` is the access's own linear address, ``None`` for a page-table entry, where ``via`` is
    the one being translated.  ``certain``: the processor makes it if it gets that far.
    """

    gpa: int | None
    size: int
    kind: AccessKind
    role: Role | None
    certain: bool
    gva: int | None = None
    via: int = 0
    level: int = 0


class _Fetched(NamedTuple):
    """The walk of a fetch, and what it leaves on an empty trail."""

    entries: tuple[Entry, ...]
    steps: tuple[Step, ...]
    tabled: frozenset[int]
    tables: dict[int, Table]
    directories: dict[int, Table]


class _Paging(NamedTuple):
    """What follows from the control registers.

    ``shift`` makes a neighbourhood of an address, 0 where there is none; ``kept`` is the level that
    a processor keeps in registers.  ``fetched`` are the walks of fetches by address and privilege:
    the faults of a loop come from the same few instructions.
    """

    state: PagingState
    shift: int
    kept: int
    fetched: dict[tuple[int, bool], _Fetched]


_MAX_FETCHED = 256


@lru_cache(maxsize=64)
def _paging(cr0: int, cr3: int, cr4: int, efer: int) -> _Paging:
    """What the registers mean for a trail, worked out once for as long as they stay."""
    state = PagingState(cr0, cr3, cr4, efer)
    mode = state.mode
    # Without paging there is no table to keep, and an address has no neighbourhood.
    shift = 0 if mode is PagingMode.NONE else mode.shift(2)
    # In PAE paging Intel's processors hold the top level in registers since CR3 was loaded.
    return _Paging(state, shift, 3 if mode is PagingMode.PAE else 0, {})


def _directory(entries: tuple[Entry, ...]) -> Table:
    """The level-2 table of a long-mode walk, as another walk may start from it."""
    rights = ALL_RIGHTS
    for _, entry, _ in entries[:-2]:
        rights &= entry ^ PT64_NX_MASK
    return Table(2, entries[-2][0] & ~_OFFSET, rights)


class Trail:
    """``steps`` so far; ``exception`` is the vector that the guest would take where it ended."""

    def __init__(self, state: CpuState, memory: GuestMemory) -> None:
        self.steps: list[Step] = []
        self.exception: int | None = None
        self.ended = False
        self._state = state
        self._memory = memory
        self._paging, self._shift, self._kept_level, self._fetched = _paging(
            state.cr0, state.cr3, state.cr4, state.efer
        )
        self._walked: tuple[Entry, ...] = ()  # the entries of the last walk that came through
        self._user = state.cpl == 3
        self._ac = bool(state.rflags & X86_EFLAGS_AC)
        # By the address's neighbourhood: the table of its pages, and that of such tables.
        self._tables: dict[int, Table] = {}
        self._directories: dict[int, Table] = {}
        self._tabled: set[int] = set()  # pages of tables, with the kind of access

    def fetch(self, address: int, size: int) -> bytes | None:
        """Follow the fetch of ``size`` bytes in one page; they, or ``None`` where it ends."""
        first = not self.steps and not self._tables
        if not (first and self._fetched_before(address)):
            if not self._part(AccessKind.FETCH, Role.FETCH, True, False, address, 1):
                return None
            if first:
                self._remember(address)
        gpa = self.steps[-1].gpa
        code = None if gpa is None else self._memory.read(gpa, size)
        self.ended = code is None
        return code

    def _fetched_before(self, address: int) -> bool:
        """Put an earlier walk on the trail, if every entry of it still is what it was."""
        before = self._fetched.get((address, self._user))
        if before is None:
            return False
        read, size = self._memory.read_entry, self._paging.entry_size
        for gpa, entry, _ in before.entries:
            if read(gpa, size) != entry:
                return False
        self.steps += before.steps
        self._tabled |= before.tabled
        self._tables.update(before.tables)
        self._directories.update(before.directories)
        return True

    def _remember(self, address: int) -> None:
        fetched = self._fetched
        if len(fetched) >= _MAX_FETCHED:
            fetched.clear()
        fetched[address, self._user] = _Fetched(
            self._walked,
            tuple(self.steps),
            frozenset(self._tabled),
            self._tables.copy(),
            self._directories.copy(),
        )

    def add(self, access: MemoryAccess) -> None:
        """Follow one access; what comes after the end of the trail is not followed."""
        if self.ended:
            return
        if access.refused:
            self._end(SS_VECTOR if access.role is Role.STACK else GP_VECTOR)
            return
        if access.address is None:
            self.steps.append(Step(None, access.size, access.kind, access.role, False))
            return
        kind, role, certain = access.kind, access.role, access.certain
        if access.physical:
            for part in access.pages():
                step = Step(part.address, part.size, kind, role, certain)
                self.steps.append(step)
            return
        address, size = access.address, access.size
        if (address & _OFFSET) + size <= _OFFSET + 1:
            self._part(kind, role, certain, access.system, address, size)
            return
        for part in access.pages():
            if not self._part(kind, role, certain, access.system, part.address, part.size):
                return

    def go_on(self, delivery: Iterable[MemoryAccess]) -> None:
        """Past the end, with the exception that the guest takes there."""
        self.ended = False
        for access in delivery:
            self.add(access)

    def fork(self) -> Trail:
        """Another trail of the same vCPU, empty, that knows the tables walked to on this one."""
        other = Trail(self._state, self._memory)
        other._tables, other._directories = self._tables, self._directories
        return other

    def _part(
        self, kind: AccessKind, role: Role, certain: bool, system: bool, address: int, size: int
    ) -> bool:
        """Follow the part of an access in one page; whether the processor gets past it."""
        result = self._walk(address, kind, system, certain)
        if type(result) is Translation:
            self._walked = result.entries
            if result.entries:
                self._entries(result.entries, result.updates, address, certain)
            self.steps.append(Step(result.gpa, size, kind, role, certain, address))
            return True
        if isinstance(result, (PageFault, EntryUnreadable)):
            self._entries(result.entries, (), address, certain)
        if isinstance(result, EntryUnreadable):
            gpa, level = result.entry_gpa, result.level
            step = Step(gpa, result.size, _READ, None, certain, None, address, level)
            self.steps.append(step)
            self.ended = certain
        elif certain:
            self._end(PF_VECTOR if isinstance(result, PageFault) else GP_VECTOR)
        return False

    def _entries(
        self,
        entries: tuple[Entry, ...],
        updates: tuple[EntryUpdate, ...],
        via: int,
        certain: bool,
    ) -> None:
        updated = {gpa for gpa, _, _ in updates} if updates else ()
        size, kept = self._paging.entry_size, self._kept_level
        tabled, steps = self._tabled, self.steps
        for gpa, _, level in entries:
            kind = _READ_WRITE if gpa in updated else _READ
            page = gpa >> 12 << 2 | kind
            if page in tabled:
                continue  # that table is on the trail already: one step to a page is enough
            sure = certain and level != kept
            if sure:
                tabled.add(page)
            steps.append(Step(gpa, size, kind, None, sure, None, via, level))

    def _walk(self, address: int, kind: AccessKind, system: bool, certain: bool) -> WalkResult:
        """Walk from the lowest table that is known: those above are on the trail already."""
        shift = self._shift
        if not shift:
            return walk(self._paging, address, kind, self._user, self._memory.read_entry)
        key = address >> shift
        table = self._tables.get(key) or self._directories.get(key >> _INDEX_BITS)
        user, ac, entry = self._user, self._ac, self._memory.read_entry
        if table is not None:
            result = walk_from(
                self._paging, table, address, kind, user, entry, ac=ac, implicit=system
            )
        else:
            result = walk(self._paging, address, kind, user, entry, ac=ac, implicit=system)
        if type(result) is Translation and (found := result.table) and found.level == 1:
            self._tables[key] = found
            if certain and table is None and len(result.entries) >= _LONG_MODE_LEVELS:
                self._directories[key >> _INDEX_BITS] = _directory(result.entries)
        return result

    def _end(self, vector: int) -> None:
        self.ended = True
        self.exception = vector

    # -- what of the guest's memory decides its further accesses ---------------------------------

    def read(self, address: int, size: int) -> bytes | None:
        """Guest memory at a linear address, whatever the rights; leaves nothing on the trail."""
        data = b""
        while size > 0:
            result = walk(self._paging, address, _READ, False, self._memory.read_entry, ac=True)
            if type(result) is not Translation:
                return None
            here = min(size, _OFFSET + 1 - (address & _OFFSET))
            part = self._memory.read(result.gpa, here)
            if part is None:
                return None
            data += part
            address, size = address + here, size - here
        return data
