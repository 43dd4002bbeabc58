"""KVM_EXIT_MMIO on RAM: KVM emulated the instruction and could not reach the page."""

from __future__ import annotations

from guestfault.fault.access import Access, AccessKind, FoundBy
from guestfault.fault.outcome import RamMmio
from guestfault.memory.slots import SlotMap

__all__ = ["from_mmio"]


def from_mmio(exit_: RamMmio, slots: SlotMap) -> Access:
    """The access of an MMIO exit on RAM: exact to the byte, and its direction is known."""
    slot = slots.find(exit_.gpa)
    return Access(
        gpa=exit_.gpa,
        size=exit_.length,
        found_by=FoundBy.MMIO,
        hva=None if slot is None else slot.hva_of(exit_.gpa),
        slot=slot,
        kind=AccessKind.WRITE if exit_.is_write else AccessKind.READ,
    )
