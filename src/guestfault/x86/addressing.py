"""From an operand to a linear address: base, index, scale, displacement, segment, wrap-around.

Three widths meet here and are easily mixed up.  The *address size* (prefix 67h) cuts the effective
address; the *stack size* (64, or the B flag of SS) cuts implicit stack addresses whatever the
address size; and outside 64-bit mode the sum with the segment's base is cut to 32 bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from iced_x86 import CodeSize, Register

from guestfault.x86.memory_access import AccessKind, MemoryAccess, Role
from guestfault.x86.segments import Segment
from guestfault.x86.state import CpuState

__all__ = ["SEGMENT_NAMES", "CodeContext", "Operand", "ReadMemory", "sign_extend"]

#: Reads ``size`` bytes of guest memory at a linear address; None where they cannot be had.
ReadMemory = Callable[[int, int], bytes | None]

_LINEAR_MASK = (1 << 64) - 1

_BITS: dict[int, int] = {CodeSize.CODE16: 16, CodeSize.CODE32: 32, CodeSize.CODE64: 64}

#: In 64-bit mode the other segments have no base.
_BASED = {Register.FS, Register.GS}

#: iced's register -> the segment, by the name it has in kvm_sregs.
SEGMENT_NAMES: dict[int, str] = {
    Register.ES: "es",
    Register.CS: "cs",
    Register.SS: "ss",
    Register.DS: "ds",
    Register.FS: "fs",
    Register.GS: "gs",
}


def _gpr_slices() -> dict[int, tuple[int, int, int]]:
    """Register -> (number in encoding order, right shift, mask)."""
    slices: dict[int, tuple[int, int, int]] = {}
    byte = (1 << 8) - 1
    for first, bits in ((Register.AX, 16), (Register.EAX, 32), (Register.RAX, 64)):
        for number in range(16):
            slices[first + number] = (number, 0, (1 << bits) - 1)
    for number in range(4):
        slices[Register.AL + number] = (number, 0, byte)
        slices[Register.AH + number] = (number, 8, byte)
    for number in range(4, 16):
        slices[Register.SPL + number - 4] = (number, 0, byte)
    return slices


_GPR_SLICES = _gpr_slices()


def sign_extend(value: int, bits: int) -> int:
    """``value``'s low ``bits`` as a signed number."""
    value &= (1 << bits) - 1
    return value - (1 << bits) if value >> (bits - 1) else value


class Operand(NamedTuple):
    """A memory operand as the instruction alone tells it: its address takes but the registers.

    The first six are iced's, with 0 for a register that there is not; ``size`` is in bytes.
    """

    segment: int
    base: int
    index_register: int
    scale: int
    displacement: int
    address_size: int
    size: int
    kind: AccessKind
    role: Role
    note: str = ""
    certain: bool = True


@dataclass(frozen=True, slots=True)
class CodeContext:
    """A register state, the size of the code it runs, and perhaps the memory behind it."""

    state: CpuState
    code_size: int
    memory: ReadMemory | None = None

    @property
    def address_bits(self) -> int:
        """Where linear addresses wrap around."""
        return 64 if self.code_size == 64 else 32

    @property
    def stack_bits(self) -> int:
        """Width of the stack pointer."""
        if self.code_size == 64:
            return 64
        return 32 if self.state.ss.db else 16

    def register(self, register: int) -> int | None:
        """Value of a general register of any width; None for every other kind."""
        found = _GPR_SLICES.get(register)
        if found is None:
            return None
        number, shift, mask = found
        return self.state.gprs[number] >> shift & mask

    def segment(self, register: int) -> Segment:
        """The segment register that iced names so."""
        segment: Segment = getattr(self.state, SEGMENT_NAMES.get(register, "ds"))
        return segment

    def selector(self, register: int) -> int | None:
        """The value of a general register as a selector."""
        value = self.register(register)
        return None if value is None else value & 0xFFFF

    def offset(
        self, base: int, index: int, scale: int, displacement: int, address_size: int
    ) -> int:
        """Effective address, cut to the address size (an iced ``CodeSize``)."""
        value = displacement
        if base:
            value += self.register(base) or 0
        if index:
            value += (self.register(index) or 0) * scale
        return value & ((1 << _BITS.get(address_size, self.code_size)) - 1)

    def linear(self, segment: int, offset: int) -> int:
        """Linear address; in 64-bit mode only FS and GS have a base."""
        if self.code_size == 64:
            base = self.segment(segment).base if segment in _BASED else 0
            return (base + offset) & _LINEAR_MASK
        return (self.segment(segment).base + offset) & 0xFFFF_FFFF

    def access(
        self,
        segment: int,
        offset: int,
        size: int,
        kind: AccessKind,
        role: Role,
        *,
        note: str = "",
        certain: bool = True,
        span: tuple[int, int] | None = None,
    ) -> MemoryAccess:
        """An access through a segment, noting if the guest itself gets an exception from it."""
        address = self.linear(segment, offset)
        refused = False
        if self.code_size == 64:
            if not self._canonical(address):
                refused = True
                note = _join(note, "not canonical: #GP or #SS in the guest, no access is made")
        elif not self.segment(segment).holds(offset, size):
            refused = True
            note = _join(note, "beyond the segment's limit: #GP or #SS in the guest")
        bits = self.address_bits
        return MemoryAccess(
            address, size, kind, role, note, certain, span, address_bits=bits, refused=refused
        )

    def operand(self, operand: Operand) -> MemoryAccess:
        """The access to a memory operand."""
        segment, base, index, scale, displacement, width, size, kind, role, note, certain = operand
        offset = self.offset(base, index, scale, displacement, width)
        return self.access(segment, offset, size, kind, role, note=note, certain=certain)

    def stack(
        self,
        displacement: int,
        size: int,
        kind: AccessKind,
        *,
        note: str = "",
        certain: bool = True,
    ) -> MemoryAccess:
        """An access ``displacement`` bytes from the stack pointer."""
        offset = (self.state.gprs[4] + displacement) & ((1 << self.stack_bits) - 1)
        return self.access(Register.SS, offset, size, kind, Role.STACK, note=note, certain=certain)

    def system(
        self,
        address: int,
        size: int,
        kind: AccessKind,
        role: Role,
        *,
        note: str = "",
        certain: bool = True,
        refused: bool = False,
    ) -> MemoryAccess:
        """An access to a system structure, by linear address."""
        bits = 64 if self.state.long_mode else 32
        return MemoryAccess(
            address % (1 << bits),
            size,
            kind,
            role,
            note,
            certain,
            address_bits=bits,
            system=True,
            refused=refused,
        )

    def unknown(self, size: int, kind: AccessKind, role: Role, why: str) -> MemoryAccess:
        """An access whose address cannot be computed from what is known."""
        return MemoryAccess(
            None, size, kind, role, why, certain=False, address_bits=self.address_bits
        )

    def load(self, address: int | None, size: int) -> int | None:
        """A little-endian number from the guest's memory, where it can be had."""
        if self.memory is None or address is None:
            return None
        data = self.memory(address, size)
        return int.from_bytes(data, "little") if data is not None and len(data) == size else None

    def _canonical(self, address: int) -> bool:
        bits = 57 if self.state.cr4 >> 12 & 1 else 48
        # Adding half the range folds the two canonical halves into one that starts at 0.
        return not (address + (1 << bits - 1) & _LINEAR_MASK) >> bits


def _join(*notes: str) -> str:
    return "; ".join(note for note in notes if note)
