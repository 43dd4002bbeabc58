"""Where an access leads in guest physical memory, by the guest's own page tables in an image."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from guestfault.explain.image import MemoryImage
from guestfault.explain.windows import window_at
from guestfault.x86 import paging
from guestfault.x86.accesses import AccessKind, MemoryAccess, Role
from guestfault.x86.addressing import ReadMemory
from guestfault.x86.registers import X86_EFLAGS_AC
from guestfault.x86.state import CpuState

__all__ = ["Translated", "Translator", "linear_reader"]


@dataclass(frozen=True, slots=True)
class Translated:
    """One page's part of an access, and where it leads.

    ``gpa`` is None when the walk stopped (``stop`` says where).  ``suspect`` is True if what was
    found speaks for this part as the failed one, False if it speaks against, None if neither.
    """

    address: int
    size: int
    gpa: int | None
    stop: str = ""
    suspect: bool | None = None


class Translator:
    """Guest page walks over the image; without one, every access yields nothing."""

    def __init__(self, state: CpuState, image: MemoryImage | None) -> None:
        self._state = state
        self._image = image
        self._paging = _paging_state(state)
        self.identity = self._paging.mode is paging.PagingMode.NONE

    def __call__(self, access: MemoryAccess) -> Iterator[Translated]:
        """The parts of ``access``, page by page."""
        if self._image is None:
            return
        for part in access.pages():
            if access.physical:
                yield _located(self._image, part.address, part.size, part.address)
            else:
                yield self._walk(self._image, access, part.address, part.size)

    def _walk(
        self, image: MemoryImage, access: MemoryAccess, address: int, size: int
    ) -> Translated:
        result = paging.walk(
            self._paging,
            address,
            access.kind,
            self._state.cpl == 3,
            image.read_entry,
            ac=bool(self._state.rflags & X86_EFLAGS_AC),
            implicit=access.system,
        )
        match result:
            case paging.Translation(gpa=gpa):
                return _located(image, address, size, gpa)
            case paging.PageFault(error_code=error_code, level=level):
                stop = (
                    f"the guest's level-{level} entry refuses it (#PF, error code "
                    f"{error_code:#x}), which the guest would handle itself"
                )
                return Translated(address, size, None, stop, False)
            case paging.NonCanonical():
                stop = "the address is not canonical, which the guest would handle itself"
                return Translated(address, size, None, stop, False)
            case paging.EntryUnreadable(entry_gpa=entry_gpa, level=level):
                stop = (
                    f"its level-{level} page-table entry at gpa {entry_gpa:#x} is not in the image"
                )
                return Translated(address, size, None, stop, True)


def _located(image: MemoryImage, address: int, size: int, gpa: int) -> Translated:
    if image.read(gpa, size) is not None:
        return Translated(address, size, gpa)
    window = window_at(gpa)
    stop = f"gpa {gpa:#x} is not in the image" + (f": {window}" if window else "")
    return Translated(address, size, gpa, stop, True)


def _paging_state(state: CpuState) -> paging.PagingState:
    return paging.PagingState(state.cr0, state.cr3, state.cr4, state.efer)


def linear_reader(state: CpuState, image: MemoryImage) -> ReadMemory:
    """Guest memory by linear address, whatever the access rights."""
    registers = _paging_state(state)

    def read(address: int, size: int) -> bytes | None:
        whole = MemoryAccess(address, size, AccessKind.READ, Role.OPERAND)
        data = b""
        for part in whole.pages():
            found = paging.walk(
                registers, part.address, AccessKind.READ, False, image.read_entry, ac=True
            )
            if not isinstance(found, paging.Translation):
                return None
            piece = image.read(found.gpa, part.size)
            if piece is None:
                return None
            data += piece
        return data

    return read
