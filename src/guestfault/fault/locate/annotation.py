"""The kernel said so: an access from ``kvm_run.memory_fault``."""

from __future__ import annotations

from guestfault.fault.access import Access, FoundBy
from guestfault.fault.outcome import MemoryFault
from guestfault.memory.slots import SlotMap

__all__ = ["from_annotation"]


def from_annotation(fault: MemoryFault, slots: SlotMap) -> Access:
    """The access of an annotated fault.  Its gpa and size are the page's; its kind is not told."""
    slot = slots.find(fault.gpa)
    return Access(
        gpa=fault.gpa,
        size=fault.size,
        found_by=FoundBy.ANNOTATION,
        hva=None if slot is None else slot.hva_of(fault.gpa),
        slot=slot,
    )
