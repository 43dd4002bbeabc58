"""The one instruction at RIP, decoded and printed.

iced-x86 decodes; this module only fixes the choices that the rest of the package shares: 15 bytes
at most, RIP-relative operands resolved against the real RIP, and Intel syntax for people.
"""

from __future__ import annotations

from functools import lru_cache

from iced_x86 import Decoder, DecoderError, Formatter, FormatterSyntax, Instruction

__all__ = ["MAX_LENGTH", "decode", "instruction_text"]

#: The architecture's limit; a longer one raises #GP.
MAX_LENGTH = 15


def _formatter() -> Formatter:
    formatter = Formatter(FormatterSyntax.INTEL)
    formatter.hex_prefix, formatter.hex_suffix = "0x", ""
    formatter.uppercase_hex = False
    formatter.small_hex_numbers_in_decimal = True
    formatter.space_after_operand_separator = True
    formatter.space_between_memory_add_operators = True
    formatter.branch_leading_zeros = False
    return formatter


_FORMATTER = _formatter()


@lru_cache(maxsize=1024)
def decode(code: bytes, ip: int, code_size: int) -> tuple[Instruction, bool]:
    """Decode the first instruction of ``code``, which lies at ``ip`` in ``code_size``-bit code.

    Returns it, not to be changed, and whether the bytes sufficed.  It ``is_invalid`` if they did
    not, or if no CPU has such an instruction.

    >>> instruction, whole = decode(bytes.fromhex("41817e285f465648"), 0xfffd1cb5, 64)
    >>> instruction_text(instruction), whole
    ('cmp dword ptr [r14 + 0x28], 0x4856465f', True)
    """
    decoder = Decoder(code_size, code[:MAX_LENGTH], ip=ip & ((1 << code_size) - 1))
    instruction = decoder.decode()
    return instruction, decoder.last_error != DecoderError.NO_MORE_BYTES


def instruction_text(instruction: Instruction) -> str:
    """Intel syntax, numbers as ``0x...``."""
    return _FORMATTER.format(instruction)
