"""Guest memory as we may read it: through the host view, and only where there is something to read.

A locator repeats the guest's page walk and decodes the instruction that stopped.  It must not touch
the guest view, where a page can be absent (and Python would sleep in it with the GIL held), and it
must not believe a page of the host view that nobody has filled yet: that one reads as zeros, which
are an instruction (``add [rax], al``) and an empty page table.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Protocol

from guestfault.memory.ram import GuestRam
from guestfault.memory.slots import SlotMap

_u32, _u64 = struct.Struct("<I").unpack_from, struct.Struct("<Q").unpack_from

__all__ = ["GuestMemory", "HostView"]


class GuestMemory(Protocol):
    """Guest physical memory, read without any effect on who else uses it."""

    def read(self, gpa: int, size: int) -> bytes | None:
        """``size`` bytes inside one page; ``None`` where there is no RAM, or nothing in it yet."""

    def read_entry(self, gpa: int, size: int) -> int | None:
        """A page-table entry of 4 or 8 bytes; ``None`` as for :meth:`read`."""

    def is_in(self, gpa: int) -> bool:
        """Whether the page has its content.  Only asked of addresses in a slot."""


class HostView:
    """One :class:`~guestfault.memory.ram.GuestRam` behind the slots of a VM.

    ``is_in(offset)`` tells whether the page at an offset of the RAM has been brought in
    (:meth:`guestfault.paging.pager.Pager.is_in`); without it every page is believed.
    """

    def __init__(
        self, slots: SlotMap, ram: GuestRam, is_in: Callable[[int], bool] | None = None
    ) -> None:
        self._slots = slots
        self._ram = ram
        self._bytes = ram.bytes
        self._is_in = is_in
        # The last slot used, as (its first gpa, its end, what to add for an offset in the RAM).
        self._last = (0, 0, 0)

    def read(self, gpa: int, size: int) -> bytes | None:
        """See :meth:`GuestMemory.read`."""
        first, end, shift = self._last
        if not first <= gpa < end:
            first, end, shift = self._find(gpa)
        at = gpa + shift
        if gpa + size > end or (self._is_in is not None and not self._is_in(at)):
            return None
        return bytes(self._bytes[at : at + size])

    def read_entry(self, gpa: int, size: int) -> int | None:
        """See :meth:`GuestMemory.read_entry`."""
        first, end, shift = self._last
        if not first <= gpa < end:
            first, end, shift = self._find(gpa)
        at = gpa + shift
        if gpa + size > end or (self._is_in is not None and not self._is_in(at)):
            return None
        entry: int = (_u64 if size == 8 else _u32)(self._bytes, at)[0]
        return entry

    def is_in(self, gpa: int) -> bool:
        """See :meth:`GuestMemory.is_in`."""
        if self._is_in is None:
            return True
        first, end, shift = self._last
        if not first <= gpa < end:
            first, end, shift = self._find(gpa)
        return gpa >= end or self._is_in(gpa + shift)

    def _find(self, gpa: int) -> tuple[int, int, int]:
        """The slot that holds a gpa, if it lies in our RAM; else one without an end."""
        slot = self._slots.find(gpa)
        if slot is None:
            return 0, 0, 0
        start = slot.hva - self._ram.guest.address
        if start < 0 or start + slot.size > self._ram.size:
            return 0, 0, 0
        self._last = slot.gpa, slot.end, start - slot.gpa
        return self._last
