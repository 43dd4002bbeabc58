"""Whether the host could serve an access to a page: the question that picks the failed one.

An instruction makes several accesses and one of them failed.  KVM failed it because
*get_user_pages* failed on the host address, so what get_user_pages looks at is looked at here, for
each of them, and nothing is faulted in on the way:

1. the mapping and its rights (:mod:`guestfault.linux.vma_rights`): without one, or without the
   right to read or write, the access fails;
2. the page tables (:mod:`guestfault.linux.pagemap`): a page that is there is served;
3. for a page that is not there: a slot that exits on a missing page fails it, and so does
   userfaultfd where it is registered; past the end of its file nothing can be there.

Any other missing page the host would bring in by itself, and may have failed to (no memory, a full
tmpfs, no huge pages): :attr:`Verdict.UNSURE`.

The answer is of the moment it is given.  Where another thread brings pages in, the page that failed
may be served by the time one asks.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Sequence
from typing import Protocol, TypeAlias

from guestfault.dialect.interface import EHWPOISON
from guestfault.linux import vma
from guestfault.linux.mapped_file import mapped_file
from guestfault.linux.pagemap import Pagemap, PageState
from guestfault.linux.vma_rights import VmaRights, VmaRightsReader
from guestfault.memory.ram import PAGE_SIZE
from guestfault.memory.slots import MemorySlot
from guestfault.uapi.kvm import KVM_MEM_READONLY
from guestfault.uapi.mman import PM_PRESENT

__all__ = ["HostResidency", "PageAccess", "Residency", "Verdict"]

_LOOK = 16  # pages, in one read of pagemap that takes hardly longer than one page
_USERFAULT_FLAGS = frozenset({"um", "ui"})


class Verdict(enum.Enum):
    """What the host would say to an access."""

    SERVED = "served"
    ABSENT = "absent"
    UNSURE = "unsure"


_SERVED = Verdict.SERVED


PageAccess: TypeAlias = tuple[int, bool]
"""A page by its host address, and whether it is to be written."""


class Residency(Protocol):
    """Who knows what the host can serve."""

    def verdicts(self, slot: MemorySlot, wanted: Iterable[PageAccess], errno: int) -> list[Verdict]:
        """One verdict for each page of a slot.

        ``errno`` is what ``KVM_RUN`` failed with, positive.
        """


class HostResidency:
    """The host itself, asked through ``/proc``: about 2 us, and 1 us for each 16 neighbours.

    ``exit_on_missing`` is the slot flag that asks KVM for an exit as soon as a page is missing, 0
    where there is none.  ``registered`` says whether the slots' memory is registered with
    userfaultfd for missing or minor faults; by default it is looked up, once for each mapping,
    which takes milliseconds.
    """

    def __init__(self, *, exit_on_missing: int = 0, registered: bool | None = None) -> None:
        self._exit_on_missing = exit_on_missing
        self._registered = registered
        self._known: dict[tuple[int, int], bool] = {}
        self._pagemap = Pagemap()
        self._rights = VmaRightsReader()

    def verdicts(self, slot: MemorySlot, wanted: Iterable[PageAccess], errno: int) -> list[Verdict]:
        """See :meth:`Residency.verdicts`."""
        found = []
        mapping: VmaRights | None = None
        start = end = first = 0
        full = False
        entries: Sequence[int] = ()
        for hva, writes in wanted:
            if not start <= hva < end:
                mapping = self._rights.at(hva)
                start, end = mapping[:2] if mapping is not None else (0, 0)
                full = mapping is not None and mapping.read and mapping.write
            if full:
                # The tables of one walk often are neighbours: a look at one is a look at all.
                i = hva // PAGE_SIZE - first
                if not 0 <= i < len(entries):
                    first, i = hva // PAGE_SIZE, 0
                    entries = self._pagemap.entries(hva, _LOOK)
                if entries[i] & PM_PRESENT:
                    found.append(_SERVED)
                    continue
            found.append(self._verdict(slot, hva, writes, mapping, errno))
        return found

    def _verdict(
        self, slot: MemorySlot, hva: int, writes: bool, mapping: VmaRights | None, errno: int
    ) -> Verdict:
        if mapping is None:
            return Verdict.ABSENT
        exits = slot.flags & self._exit_on_missing
        if slot.flags & KVM_MEM_READONLY:
            writes = False  # a write to such a slot is an MMIO exit and no failure
        elif exits:
            writes = True  # fast GUP asks for a writable page even to read it
        if not mapping.read or (writes and not mapping.write):
            return Verdict.ABSENT
        if self._pagemap.present(hva):
            return Verdict.SERVED
        if exits:
            return Verdict.ABSENT
        state = self._pagemap.state(hva)
        if state.swapped:
            return _swapped(state, errno)
        if self._is_registered(mapping) or _past_end(hva):
            return Verdict.ABSENT
        return Verdict.UNSURE

    def _is_registered(self, mapping: VmaRights) -> bool:
        if self._registered is not None:
            return self._registered
        key = mapping.start, mapping.end
        if key not in self._known:
            self._known = {
                (one.start, one.end): bool(_USERFAULT_FLAGS & (one.flags or frozenset()))
                for one in vma.vmas(flags=True)
            }
        return self._known.get(key, False)

    def close(self) -> None:
        """Close what it opened.  May be called again."""
        self._pagemap.close()
        self._rights.close()


def _swapped(state: PageState, errno: int) -> Verdict:
    """A page whose entry is not empty: in swap, on the move, poisoned, or a guard."""
    # A poisoned page of a file looks like one in swap to whoever may not see the entry's type.
    if state.poisoned or state.guard or errno == EHWPOISON:
        return Verdict.ABSENT
    return Verdict.UNSURE


def _past_end(hva: int) -> bool:
    """Whether the file behind an address ends before its page."""
    found = vma.find(hva)
    file = None if found is None else mapped_file(found, hva)
    if found is None or file is None:
        return False
    return found.offset_of(hva & -PAGE_SIZE) >= file.size
