"""The parts of an ioctl's number do not run into each other."""

from __future__ import annotations

from ctypes import Structure, c_uint8, c_uint64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.uapi.ioctl_numbers import _IO, _IOC, _IOR, _IOW, _IOWR


class Kilobyte(Structure):
    _fields_ = [("bytes", c_uint8 * 1024)]


@given(st.integers(0, 3), st.integers(0, 255), st.integers(0, 255), st.integers(0, (1 << 14) - 1))
def test_the_parts_come_back(direction: int, type_: int, nr: int, size: int) -> None:
    number = _IOC(direction, type_, nr, size)
    assert number < 1 << 32
    assert (number & 0xFF, number >> 8 & 0xFF) == (nr, type_)
    assert (number >> 16 & 0x3FFF, number >> 30) == (size, direction)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (_IO(0xAE, 0x80), 0x0000AE80),
        (_IOW(0xAE, 0x48, c_uint64), 0x4008AE48),
        (_IOR(0xAE, 0x81, Kilobyte), 0x8400AE81),
        (_IOWR(0xAE, 0x85, Kilobyte), 0xC400AE85),
    ],
)
def test_directions_and_sizes(number: int, expected: int) -> None:
    assert number == expected
