"""How the engine hands over the memory accesses of one instruction: piece by piece, in a window.

While KVM's emulator has the processor carry out an instruction, no page of the guest is mapped.
Every page of data that the instruction touches becomes a page of the *device window*, a range of
the engine's physical addresses whose accesses are calls.  The window's pages are numbered in the
order in which they are first touched, so that each call can be traced to a linear address.

Unicorn delivers an access in pieces: of four bytes at most, of one if it is not aligned, and with
neighbours that nobody asked for if it is a read.  Its access hook, called just before the first
piece, says what the access was.  And it makes operands of more than eight bytes in several
accesses, one after the other.  :class:`DeviceWindow` puts all of that together again: its
:class:`~guestfault.softkvm.processor.EmulatedMemory` sees each operand once and whole.
"""

from __future__ import annotations

from guestfault.softkvm.processor import MAX_PHYS, EmulatedMemory

__all__ = ["DEVICE_WINDOW", "DeviceWindow"]

DEVICE_WINDOW = MAX_PHYS
"""Where the engine finds the window."""
_PAGE_SIZE = 4096
_OFFSET = _PAGE_SIZE - 1


class DeviceWindow:
    """The data accesses of one instruction after another, each begun with :meth:`begin`."""

    def __init__(self) -> None:
        self._linear: list[int] = []  # of the window's pages
        self._window: dict[int, int] = {}  # and back
        self.refused = False
        """Whether the memory has refused an access: the instruction is lost."""

    def begin(self, memory: EmulatedMemory, operand: int) -> None:
        """Before an instruction whose memory operand has ``operand`` bytes, 0 if unknown."""
        self._linear.clear()
        self._window.clear()
        self.refused = False
        self._memory = memory
        self._operand = {False: operand, True: operand}  # by whether it is written
        # The access under way: where it begins, its bytes, and how many of them the engine has
        # asked for or given so far.
        self._is_write = False
        self._start = self._size = self._done = 0
        self._data = bytearray()
        self._filled = 0

    def page(self, gva: int) -> int:
        """The engine-physical page for the page of a linear address."""
        page = gva & -_PAGE_SIZE
        at = self._window.get(page)
        if at is None:
            at = self._window[page] = DEVICE_WINDOW + len(self._linear) * _PAGE_SIZE
            self._linear.append(page)
        return at

    def on_access(self, is_write: bool, address: int, size: int) -> None:
        """An access begins, at an engine-physical address."""
        if address < DEVICE_WINDOW:
            return
        linear = self._at(address - DEVICE_WINDOW)
        continues = (
            is_write is self._is_write
            and linear == self._start + self._done
            and self._done + size <= self._size
        )
        if continues:
            self._done += size
            return
        self._flush()
        # Only the first access of each kind can begin the operand; a stack's comes after it.
        operand = self._operand[is_write]
        self._operand[is_write] = 0
        self._is_write, self._start, self._done = is_write, linear, size
        self._size = max(size, operand)
        self._data.clear()
        self._filled = 0

    def on_read(self, offset: int, size: int) -> int:
        """A piece is read, at an offset in the window."""
        if not self._data:
            data = None if self.refused else self._memory.read(self._start, self._size)
            self.refused = data is None
            self._data += data or bytes(self._size)
        first = self._at(offset) - self._start
        piece = bytearray(size)
        for at in range(max(0, -first), min(size, self._size - first)):
            piece[at] = self._data[first + at]
        return int.from_bytes(piece, "little")

    def on_write(self, offset: int, size: int, value: int) -> None:
        """A piece is written."""
        if not self._data:
            self._data += bytes(self._size)
        first = self._at(offset) - self._start
        piece = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        self._data[first : first + size] = piece
        self._filled = first + size
        if self._filled == self._size:
            self._flush()

    def finish(self) -> None:
        """The instruction has completed, as far as the engine is concerned."""
        self._flush()

    def _flush(self) -> None:
        """Make the write under way, as much of it as there is."""
        filled, self._filled = self._filled, 0
        if filled and not self.refused:
            self.refused = not self._memory.write(self._start, bytes(self._data[:filled]))

    def _at(self, offset: int) -> int:
        return self._linear[offset // _PAGE_SIZE] + (offset & _OFFSET)
