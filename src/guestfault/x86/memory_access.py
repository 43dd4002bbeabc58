"""One access to memory, as an instruction is about to make it.

An access is either certain - it will be made if the instruction gets that far - or it is not, and
then says why: a mask register that is not known, a selector that lies in memory, a condition.  An
address that cannot be computed is ``None``; it is never a guess.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from guestfault.x86.access_kind import AccessKind

__all__ = ["PAGE_SIZE", "AccessKind", "MemoryAccess", "PagePart", "Role"]

PAGE_SIZE = 4096


class Role(StrEnum):
    """What an access is for."""

    FETCH = "instruction fetch"
    OPERAND = "operand"
    ELEMENT = "vector element"
    STACK = "stack"
    SHADOW_STACK = "shadow stack"
    STRING_SOURCE = "string source"
    STRING_DESTINATION = "string destination"
    CACHE_LINE = "cache line"
    DESCRIPTOR = "segment descriptor"
    GATE = "interrupt gate"
    INTERRUPT_VECTOR = "interrupt vector"
    TSS = "task state segment"
    IO_BITMAP = "I/O permission bitmap"
    PDPTES = "page directory pointers"
    VMCB = "virtual machine control block"
    SMRAM = "SMM state"


class PagePart(NamedTuple):
    """The part of an access that lies in one 4 KiB page: all of it, or one side of a crossing."""

    address: int
    size: int

    @property
    def page(self) -> int:
        """Address of the page."""
        return self.address & -PAGE_SIZE


class MemoryAccess(NamedTuple):
    """An access of ``size`` bytes at linear ``address``.

    ``span`` is (lowest address, bytes) of everything that the rest of a REP instruction may touch
    through the same operand; ``address`` and ``size`` are then those of its next element.
    ``physical`` marks the few accesses that bypass paging, ``system`` those that the processor
    makes for itself, as a supervisor at any CPL.  ``refused`` says that the guest itself gets an
    exception (#GP, #SS) in place of the access.  ``address_bits`` is where linear addresses wrap
    around: 32 outside 64-bit mode.
    """

    address: int | None
    size: int
    kind: AccessKind
    role: Role
    note: str = ""
    certain: bool = True
    span: tuple[int, int] | None = None
    physical: bool = False
    address_bits: int = 64
    system: bool = False
    refused: bool = False

    def pages(self) -> tuple[PagePart, ...]:
        """Its parts, page by page in the order of addresses; empty when the address is not known.

        >>> MemoryAccess(0x1FFE, 4, AccessKind.READ, Role.OPERAND).pages()
        (PagePart(address=8190, size=2), PagePart(address=8192, size=2))
        """
        if self.address is None:
            return ()
        parts = []
        address, left = self.address, self.size
        while left > 0:
            here = min(left, PAGE_SIZE - address % PAGE_SIZE)
            parts.append(PagePart(address, here))
            address = (address + here) % (1 << self.address_bits)
            left -= here
        return tuple(parts)

    @property
    def crosses_page(self) -> bool:
        """Whether it touches more than one page, each of which may be the one that is absent."""
        return len(self.pages()) > 1

    def __str__(self) -> str:
        where = "an unknown address" if self.address is None else f"{self.address:#x}"
        size = "1 byte" if self.size == 1 else f"{self.size} bytes"
        return f"{self.kind} of {size} at {where} ({self.role})"
