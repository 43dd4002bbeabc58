"""A few instructions and labels: what the built-in guests are assembled with.

iced-x86 knows every instruction by an exact code, ``ADD_R64_RM64``; a guest is written for two
processor modes, so what it needs is "add a *word*", wide in long mode and 32 bits in real mode, and
"add a *dword*" for indices, the same in both.  The registers are the eight that both modes have.

Only instructions that an emulator handles as gladly as a processor are offered, for KVM runs whole
guests through its instruction emulator on some hosts: no string instructions, no bit scans, no SSE,
and no stack.
"""

from __future__ import annotations

from iced_x86 import BlockEncoder, Code, Instruction, MemoryOperand, Register, Register_

__all__ = ["Assembler", "Operand"]

_NAMES = ("AX", "CX", "DX", "BX", "SP", "BP", "SI", "DI")
_DWORDS = {name: getattr(Register, f"E{name}") for name in _NAMES}
_QWORDS = {name: getattr(Register, f"R{name}") for name in _NAMES}


class Operand:
    """One register as ``bits`` wide: ``word`` or ``dword`` of an :class:`Assembler` makes it."""

    def __init__(self, name: str, bits: int) -> None:
        self.bits = bits
        self.register: Register_ = (_QWORDS if bits == 64 else _DWORDS)[name]


class Assembler:
    """Collects instructions for a processor in ``bitness`` 64 or 16 and encodes them.

    A word is 64 bits in long mode (64) and 32 bits in real mode (16).  Destinations come first.
    Both operands of an instruction have the same width.
    """

    def __init__(self, bitness: int) -> None:
        self.bitness = bitness
        self.word_bits = 64 if bitness == 64 else 32
        self._encoder = BlockEncoder(bitness)
        self._labels = 0
        self._pending: int | None = None

    def word(self, name: str) -> Operand:
        """The register ``AX``, ``CX``, ... as a word."""
        return Operand(name, self.word_bits)

    def dword(self, name: str) -> Operand:
        """Its low 32 bits; writing them clears the rest."""
        return Operand(name, 32)

    def label(self) -> int:
        """A label on the next instruction, for a later branch back to it."""
        # The encoder takes a branch's target to be the instruction whose ip equals it; 0 is none.
        if self._pending is None:
            self._labels += 1
            self._pending = self._labels
        return self._pending

    def mov(self, to: Operand, source: Operand | int) -> None:
        """Copy a register, or load a constant below 2 ** ``to.bits``."""
        if isinstance(source, int):
            code = Code.MOV_R64_IMM64 if to.bits == 64 else Code.MOV_R32_IMM32
            make = Instruction.create_reg_u64 if to.bits == 64 else Instruction.create_reg_u32
            self._add(make(code, to.register, source))
        else:
            self._alu("MOV", to, source)

    def add(self, to: Operand, source: Operand | int) -> None:
        """to += source; a constant is a signed 32-bit one."""
        self._alu("ADD", to, source)

    def sub(self, to: Operand, source: Operand | int) -> None:
        """to -= source."""
        self._alu("SUB", to, source)

    def xor(self, to: Operand, source: Operand) -> None:
        """to ^= source."""
        self._alu("XOR", to, source)

    def and_(self, to: Operand, source: int) -> None:
        """to &= source."""
        self._alu("AND", to, source)

    def or_(self, to: Operand, source: int) -> None:
        """to |= source."""
        self._alu("OR", to, source)

    def cmp(self, left: Operand, right: Operand) -> None:
        """Set the flags for a branch."""
        self._alu("CMP", left, right)

    def imul(self, to: Operand, source: Operand, factor: int) -> None:
        """to = source * factor, a signed 32-bit constant."""
        code = getattr(Code, f"IMUL_R{to.bits}_RM{to.bits}_IMM32")
        self._add(Instruction.create_reg_reg_i32(code, to.register, source.register, factor))

    def shl(self, to: Operand, count: int) -> None:
        """to <<= count."""
        code = getattr(Code, f"SHL_RM{to.bits}_IMM8")
        self._add(Instruction.create_reg_i32(code, to.register, count))

    def shr(self, to: Operand, count: int | None = None) -> None:
        """to >>= count, or the count in CL if none is given."""
        if count is None:
            code = getattr(Code, f"SHR_RM{to.bits}_CL")
            self._add(Instruction.create_reg_reg(code, to.register, Register.CL))
        else:
            code = getattr(Code, f"SHR_RM{to.bits}_IMM8")
            self._add(Instruction.create_reg_i32(code, to.register, count))

    def dec(self, to: Operand) -> None:
        """to -= 1, for a branch that follows."""
        self._add(Instruction.create_reg(getattr(Code, f"DEC_RM{to.bits}"), to.register))

    def lea(self, to: Operand, base: Operand, displacement: int) -> None:
        """to = base + displacement."""
        code = getattr(Code, f"LEA_R{to.bits}_M")
        self._add(Instruction.create_reg_mem(code, to.register, _at(base, displacement)))

    def add_memory(self, to: Operand, base: Operand, displacement: int) -> None:
        """to += the word at base + displacement."""
        code = getattr(Code, f"ADD_R{to.bits}_RM{to.bits}")
        self._add(Instruction.create_reg_mem(code, to.register, _at(base, displacement)))

    def xor_memory(self, base: Operand, displacement: int, source: Operand) -> None:
        """The word at base + displacement ^= source, a read and a write."""
        code = getattr(Code, f"XOR_RM{source.bits}_R{source.bits}")
        self._add(Instruction.create_mem_reg(code, _at(base, displacement), source.register))

    def store(self, base: Operand, source: Operand) -> None:
        """The word at base = source: a write and no read."""
        code = getattr(Code, f"MOV_RM{source.bits}_R{source.bits}")
        self._add(Instruction.create_mem_reg(code, _at(base, 0), source.register))

    def out(self, port: int, bits: int) -> None:
        """Write AL (8) or EAX (32) to a port below 256."""
        code, source = (
            (Code.OUT_IMM8_AL, Register.AL) if bits == 8 else (Code.OUT_IMM8_EAX, Register.EAX)
        )
        self._add(Instruction.create_i32_reg(code, port, source))

    def branch(self, condition: str, target: int) -> None:
        """Branch to a label: ``JMP``, ``JNE``, ``JAE``."""
        # The encoder widens it when the target is out of a byte's reach.
        code = getattr(Code, f"{condition}_REL8_{self.bitness}")
        self._add(Instruction.create_branch(code, target))

    def encode(self, address: int) -> bytes:
        """The machine code, for this linear address."""
        return self._encoder.encode(address)

    def _alu(self, operation: str, to: Operand, source: Operand | int) -> None:
        if isinstance(source, int):
            code = getattr(Code, f"{operation}_RM{to.bits}_IMM32")
            make = Instruction.create_reg_i32 if source < 1 << 31 else Instruction.create_reg_u32
            self._add(make(code, to.register, source))
        else:
            code = getattr(Code, f"{operation}_R{to.bits}_RM{to.bits}")
            self._add(Instruction.create_reg_reg(code, to.register, source.register))

    def _add(self, instruction: Instruction) -> None:
        instruction.ip = self._pending or 0
        self._pending = None
        self._encoder.add(instruction)


def _at(base: Operand, displacement: int) -> MemoryOperand:
    return MemoryOperand(base.register, displ=displacement, displ_size=1 if displacement else 0)
