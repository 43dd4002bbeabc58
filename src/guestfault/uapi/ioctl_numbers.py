"""How Linux builds the number of an ioctl from its direction, type, ordinal and argument size.

The functions are the macros ``_IO``, ``_IOR``, ``_IOW`` and ``_IOWR`` of
``include/uapi/asm-generic/ioctl.h``, which x86 uses unchanged.  The direction is the program's:
``_IOW`` writes to the kernel, ``_IOR`` reads from it.  The size of the argument is part of the
number, so a structure that grows is another ioctl; an argument that ends in a flexible array counts
with its header only.
"""

from __future__ import annotations

from ctypes import Structure, c_bool, c_uint64, sizeof
from typing import Final

__all__ = ["_IO", "_IOC", "_IOR", "_IOW", "_IOWR"]

_NRSHIFT: Final = 0
_TYPESHIFT: Final = 8
_SIZESHIFT: Final = 16
_DIRSHIFT: Final = 30

_NONE: Final = 0
_WRITE: Final = 1
_READ: Final = 2


def _IOC(direction: int, type_: int, nr: int, size: int) -> int:
    """The number, from a direction of 2 bits, a type and an ordinal of 8, and a size of 14."""
    return direction << _DIRSHIFT | size << _SIZESHIFT | type_ << _TYPESHIFT | nr << _NRSHIFT


def _IO(type_: int, nr: int) -> int:
    """An ioctl without an argument, or whose argument is a plain number."""
    return _IOC(_NONE, type_, nr, 0)


def _IOR(type_: int, nr: int, argument: type[Structure | c_uint64]) -> int:
    """An ioctl that fills its argument."""
    return _IOC(_READ, type_, nr, sizeof(argument))


def _IOW(type_: int, nr: int, argument: type[Structure | c_uint64]) -> int:
    """An ioctl that takes its argument."""
    return _IOC(_WRITE, type_, nr, sizeof(argument))


def _IOWR(type_: int, nr: int, argument: type[Structure | c_uint64 | c_bool]) -> int:
    """An ioctl that takes its argument and fills it."""
    return _IOC(_READ | _WRITE, type_, nr, sizeof(argument))
