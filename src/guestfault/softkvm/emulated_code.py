"""Where the engine finds the code of an instruction that KVM emulates: in copies of our own.

The emulator has fetched the instruction already, and may carry it out a second time when userspace
has answered a read; by then the guest's page may be gone.  So the engine is given the bytes that
were fetched, at the address they were fetched from.

A copy is never changed: the engine keeps its translation of it, which makes the usual case, a
driver that comes back to the same instruction, cheap.
"""

from __future__ import annotations

import ctypes
import mmap

from guestfault.softkvm.engine import Engine

__all__ = ["EmulatedCode"]

_PAGE_SIZE = 4096
_COPIES = 64


class EmulatedCode:
    """Pages of code at ``address``, an engine-physical address with room for :attr:`SIZE` bytes."""

    SIZE = _COPIES * _PAGE_SIZE

    def __init__(self, engine: Engine, address: int) -> None:
        self._engine = engine
        self._address = address
        self._memory = mmap.mmap(-1, self.SIZE)
        with memoryview(self._memory) as view:
            anchor = ctypes.c_char.from_buffer(view)
            engine.map(address, self.SIZE, ctypes.addressof(anchor))
            del anchor
        self._copies: dict[tuple[int, bytes], int] = {}
        self._at = 0
        self._code = b""

    def close(self) -> None:
        """Free the memory; the engine is closed already."""
        self._memory.close()

    def begin(self, linear: int, code: bytes) -> None:
        """These bytes are the code at a linear address from now on."""
        self._at, self._code = linear, code
        if len(self._copies) + 2 > _COPIES:
            self._copies.clear()
            self._engine.flush_code()

    def page(self, gva: int) -> int | None:
        """The engine-physical page for a fetch, ``None`` where the code does not reach."""
        page = gva & -_PAGE_SIZE
        first = max(self._at, page)
        code = self._code[first - self._at : page + _PAGE_SIZE - self._at]
        if not code or page + _PAGE_SIZE <= self._at:
            return None
        offset = first - page
        copy = self._copies.get((offset, code))
        if copy is None:
            copy = self._copies[offset, code] = len(self._copies) * _PAGE_SIZE
            self._memory[copy : copy + _PAGE_SIZE] = bytes(_PAGE_SIZE)
            self._memory[copy + offset : copy + offset + len(code)] = code
        return self._address + copy
