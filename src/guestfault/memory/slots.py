"""Memory slots as userspace keeps them: gpa to hva and back, and bad ones refused with numbers.

KVM answers a bad slot with EINVAL or EEXIST and no more.  Here the same mistakes are found before
KVM is asked, and the error says which number is wrong.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass

from guestfault.errors import GuestfaultError
from guestfault.memory.ram import PAGE_SIZE

__all__ = ["MemorySlot", "SlotError", "SlotMap"]

_GPA_LIMIT = 1 << 52


@dataclass(frozen=True, slots=True, order=True)
class MemorySlot:
    """``size`` bytes at guest physical address ``gpa``, backed from host address ``hva`` on."""

    gpa: int
    size: int
    hva: int
    slot: int
    flags: int = 0

    @property
    def end(self) -> int:
        """The gpa past the last byte."""
        return self.gpa + self.size

    def hva_of(self, gpa: int) -> int:
        """The host address of a gpa inside the slot."""
        return self.hva + gpa - self.gpa

    def __str__(self) -> str:
        return f"slot {self.slot} (gpa {self.gpa:#x} to {self.end:#x})"


class SlotError(GuestfaultError):
    """A slot that cannot be added: ``slot`` is it, ``other`` the one it collides with, if any."""

    def __init__(self, slot: MemorySlot, why: str, other: MemorySlot | None = None) -> None:
        self.slot = slot
        self.other = other
        super().__init__(f"{slot}: {why}")


class SlotMap:
    """The slots of one VM.  Built before its vCPUs run and not changed under them.

    >>> slots = SlotMap()
    >>> slots.add(MemorySlot(gpa=0x1000, size=0x2000, hva=0x7f0000000000, slot=0))
    >>> hex(slots.gpa_to_hva(0x1008))
    '0x7f0000000008'
    """

    def __init__(self) -> None:
        self._slots: list[MemorySlot] = []
        self._gpas: list[int] = []  # of the same slots, for a search without a call for each

    def __iter__(self) -> Iterator[MemorySlot]:
        return iter(self._slots)

    def add(self, slot: MemorySlot) -> None:
        """Add a slot; :class:`SlotError` for one that is misaligned, too large or overlaps."""
        for name, value in (("gpa", slot.gpa), ("size", slot.size), ("hva", slot.hva)):
            if value % PAGE_SIZE:
                raise SlotError(slot, f"{name} {value:#x} is not a multiple of {PAGE_SIZE}")
        if slot.size <= 0:
            raise SlotError(slot, f"size {slot.size:#x} is not positive")
        if slot.gpa < 0 or slot.end > _GPA_LIMIT:
            raise SlotError(slot, f"it is not below guest physical address {_GPA_LIMIT:#x}")
        for other in self._slots:
            if other.slot == slot.slot:
                raise SlotError(slot, f"slot number {slot.slot} is taken by {other}", other)
            if slot.gpa < other.end and other.gpa < slot.end:
                raise SlotError(slot, f"it overlaps {other}", other)
        i = bisect_right(self._gpas, slot.gpa)
        self._slots.insert(i, slot)
        self._gpas.insert(i, slot.gpa)

    def find(self, gpa: int) -> MemorySlot | None:
        """The slot that holds a gpa, or ``None``: a device, or nothing, is there."""
        i = bisect_right(self._gpas, gpa)
        if i:
            slot = self._slots[i - 1]
            if gpa < slot.gpa + slot.size:
                return slot
        return None

    def gpa_to_hva(self, gpa: int) -> int | None:
        """The host address that backs a gpa, if it is in a slot."""
        slot = self.find(gpa)
        return None if slot is None else slot.hva_of(gpa)

    def hva_to_gpa(self, hva: int) -> int | None:
        """The first gpa that a host address backs, if any slot does."""
        for slot in self._slots:
            if slot.hva <= hva < slot.hva + slot.size:
                return slot.gpa + hva - slot.hva
        return None
