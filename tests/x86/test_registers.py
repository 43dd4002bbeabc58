"""The names in registers.py against the kernel's own header, and the words for error codes."""

import re
from pathlib import Path

import pytest

from guestfault.x86 import registers

HEADERS = [
    Path("/usr/include/x86_64-linux-gnu/asm/processor-flags.h"),
    Path("/usr/include/asm/processor-flags.h"),
]


def kernel_flags() -> dict[str, int]:
    """``X86_CR4_PAE`` -> bit number, from the ``_BIT`` definitions of processor-flags.h."""
    for header in HEADERS:
        if header.exists():
            found = re.findall(r"#define (X86_\w+)_BIT\s+(\d+)", header.read_text())
            return {name: int(bit) for name, bit in found}
    pytest.skip("asm/processor-flags.h is not installed (linux-libc-dev)")


def test_flags_have_the_bits_of_the_kernel_header():
    checked = 0
    for name, bit in kernel_flags().items():
        ours = name if name.startswith("X86_EFLAGS_") else name.removeprefix("X86_")
        value = getattr(registers, ours, None)
        if value is not None and name != "X86_EFLAGS_IOPL":
            assert value == 1 << bit, name
            checked += 1
    assert checked > 40


def test_iopl_is_a_field_of_two_bits():
    assert registers.X86_EFLAGS_IOPL == 0x3000
    assert registers.X86_EFLAGS_IOPL_BIT == 12


def test_everything_exported_exists_once():
    assert len(set(registers.__all__)) == len(registers.__all__)
    assert all(hasattr(registers, name) for name in registers.__all__)


def test_vectors_have_the_manuals_mnemonics():
    assert registers.EXCEPTION_NAMES[14] == "#PF"
    for name in registers.__all__:
        if name.endswith("_VECTOR"):
            vector = getattr(registers, name)
            assert registers.EXCEPTION_NAMES[vector].lstrip("#") == name.removesuffix("_VECTOR")
    assert {8, 10, 11, 12, 13, 14, 17, 21} == registers.ERROR_CODE_VECTORS


@pytest.mark.parametrize(
    ("error_code", "words"),
    [
        (0b00000, "supervisor read, not present"),
        (0b00111, "user write, protection"),
        (0b01001, "supervisor read, reserved bit set"),
        (0b10101, "user fetch, protection"),
        (0b100101, "user read, protection key"),
        (0b1000111, "user write (shadow stack), protection"),
    ],
)
def test_error_code_in_words(error_code: int, words: str):
    assert registers.describe_error_code(error_code) == words
