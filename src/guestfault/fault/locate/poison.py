"""SIGBUS: the host address of a page that is broken, from the signal that KVM sent the thread."""

from __future__ import annotations

from guestfault.fault.access import Access, FoundBy
from guestfault.fault.outcome import Poisoned
from guestfault.memory.ram import PAGE_SIZE
from guestfault.memory.slots import SlotMap

__all__ = ["from_poison"]


def from_poison(poisoned: Poisoned, slots: SlotMap) -> Access:
    """The access of a SIGBUS: the page that it met, where the slots say that the guest has it.

    What is lost with the page may be more (``2**lsb`` bytes).  Where several slots show the same
    memory, it is the first place; the gpa is unknown if none does, and the page another part of
    the process's memory.
    """
    hva = poisoned.hva & -PAGE_SIZE
    gpa = slots.hva_to_gpa(hva)
    slot = None if gpa is None else slots.find(gpa)
    return Access(gpa, PAGE_SIZE, FoundBy.SIGNAL, hva=hva, slot=slot)
