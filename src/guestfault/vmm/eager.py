"""What must be in before a guest's first instruction, on a KVM that does not report its absence.

Some accesses fail without an exit that could be answered.  Under shadow paging KVM reads the
guest's page tables itself, and an absent one looks to it like an entry that is not present: the
guest gets a page fault of its own.  KVM's instruction emulator, where it runs the guest, cannot
fetch from an absent page and gives the instruction up.  So these pages are brought in first: the
page tables in use, and the page of the first instruction.

The same holds under userfaultfd.  There such an access sleeps like any other, but when its source
fails, or the VM is stopped, the sleeper has to be let go, and its access fails after all.
"""

from __future__ import annotations

from collections.abc import Iterator

from guestfault.guest.snapshot import Snapshot
from guestfault.memory.slots import SlotMap
from guestfault.paging.pager import Pager
from guestfault.x86.paging import AccessKind, PagingState, ReadEntry, Translation, walk
from guestfault.x86.table_pages import table_pages

__all__ = ["bring_in_eagerly"]


def bring_in_eagerly(snapshot: Snapshot, pager: Pager, slots: SlotMap) -> int:
    """Bring in what every vCPU of the snapshot needs to start; how many pages that was.

    Raises :class:`~guestfault.paging.source.base.SourceError`.
    """
    before = pager.pages_in

    def bring_in(gpa: int) -> int | None:
        """The RAM offset of a gpa whose page is in now; ``None`` for one in no slot."""
        hva = slots.gpa_to_hva(gpa)
        if hva is None:
            return None
        offset = hva - pager.ram.guest.address
        pager.bring_in(offset)
        return offset

    def read_entry(gpa: int, size: int) -> int | None:
        offset = bring_in(gpa)
        if offset is None:
            return None
        return int.from_bytes(pager.ram.bytes[offset : offset + size], "little")

    for gpa in _needed(snapshot, read_entry):
        bring_in(gpa)
    return pager.pages_in - before


def _needed(snapshot: Snapshot, read_entry: ReadEntry) -> Iterator[int]:
    for vcpu in snapshot.vcpus:
        s = vcpu.sregs
        paging = PagingState(s.cr0, s.cr3, s.cr4, s.efer)
        yield from table_pages(paging, read_entry)
        linear = (s.cs.base + vcpu.regs.rip) & 2**64 - 1
        found = walk(paging, linear, AccessKind.FETCH, s.cs.dpl == 3, read_entry)
        if isinstance(found, Translation):
            yield found.gpa
