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
from guestfault.x86.memory_access import MemoryAccess, Role
from guestfault.x86.paging import (
    EntryUnreadable,
    PageFault,
    PagingMode,
    PagingState,
    Table,
    Translation,
    WalkResult,
    walk,
    walk_from,
)
from guestfault.x86.registers import GP_VECTOR, PF_VECTOR, SS_VECTOR, X86_EFLAGS_AC
from guestfault.x86.state import CpuState

__all__ = ["Step", "Trail"]

_READ, _READ_WRITE = AccessKind.READ, AccessKind.READ_WRITE
_OFFSET = 4095


@lru_cache(maxsize=64)
def _paging(cr0: int, cr3: int, cr4: int, efer: int) -> tuple[PagingState, int, int]:
    """The state, the shift that makes a neighbourhood of an address, and the level kept.

    One object serves for as long as the registers stay, for it works out what follows from them
    once.
    """
    state = PagingState(cr0, cr3, cr4, efer)
    mode = state.mode
    # Without paging there is no table to keep, and an address has no neighbourhood.
    shift = 0 if mode is PagingMode.NONE else mode.shift(2)
    # In PAE paging Intel's processors hold the top level in registers since CR3 was loaded.
    return state, shift, 3 if mode is PagingMode.PAE else 0


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


class Trail:
    """``steps`` so far; ``exception`` is the vector that the guest would take where it ended."""

    def __init__(self, state: CpuState, memory: GuestMemory) -> None:
        self.steps: list[Step] = []
        self.exception: int | None = None
        self.ended = False
        self._state = state
        self._memory = memory
        self._paging, self._shift, self._kept_level = _paging(
            state.cr0, state.cr3, state.cr4, state.efer
        )
        self._user = state.cpl == 3
        self._ac = bool(state.rflags & X86_EFLAGS_AC)
        self._tables: dict[int, Table] = {}
        self._tabled: set[tuple[int, AccessKind]] = set()

    def fetch(self, address: int, size: int) -> bytes | None:
        """Follow the fetch of ``size`` bytes in one page; they, or ``None`` where it ends."""
        if not self._part(AccessKind.FETCH, Role.FETCH, True, False, address, 1):
            return None
        gpa = self.steps[-1].gpa
        code = None if gpa is None else self._memory.read(gpa, size)
        self.ended = code is None
        return code

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
        other._tables = self._tables
        return other

    def _part(
        self, kind: AccessKind, role: Role, certain: bool, system: bool, address: int, size: int
    ) -> bool:
        """Follow the part of an access in one page; whether the processor gets past it."""
        result = self._walk(address, kind, system)
        if type(result) is Translation:
            self._entries(result, address, certain)
            self.steps.append(Step(result.gpa, size, kind, role, certain, address))
            return True
        if isinstance(result, (PageFault, EntryUnreadable)):
            self._entries(result, address, certain)
        if isinstance(result, EntryUnreadable):
            gpa, level = result.entry_gpa, result.level
            step = Step(gpa, result.size, _READ, None, certain, None, address, level)
            self.steps.append(step)
            self.ended = certain
        elif certain:
            self._end(PF_VECTOR if isinstance(result, PageFault) else GP_VECTOR)
        return False

    def _entries(
        self, result: Translation | PageFault | EntryUnreadable, via: int, certain: bool
    ) -> None:
        if not result.entries:
            return
        updates = result.updates if type(result) is Translation else ()
        updated = {gpa for gpa, _, _ in updates} if updates else ()
        size, kept = self._paging.entry_size, self._kept_level
        tabled = self._tabled
        for gpa, _, level in result.entries:
            kind = _READ_WRITE if gpa in updated else _READ
            page = gpa >> 12, kind
            if page in tabled:
                continue  # that table is on the trail already: one step to a page is enough
            sure = certain and level != kept
            if sure:
                tabled.add(page)
            self.steps.append(Step(gpa, size, kind, None, sure, None, via, level))

    def _walk(self, address: int, kind: AccessKind, system: bool) -> WalkResult:
        """Walk from the neighbourhood's last table: the levels above are on the trail already."""
        key = address >> self._shift
        table = self._tables.get(key) if self._shift else None
        user, ac, entry = self._user, self._ac, self._memory.read_entry
        if table is not None:
            return walk_from(
                self._paging, table, address, kind, user, entry, ac=ac, implicit=system
            )
        result = walk(self._paging, address, kind, user, entry, ac=ac, implicit=system)
        if type(result) is Translation and result.table is not None and result.table.level == 1:
            self._tables[key] = result.table
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
