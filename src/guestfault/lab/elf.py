"""The little of the ELF format that the lab needs, read from the bytes of a file.

``readelf`` would say it too, but a machine without binutils should have a lab as well.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from typing import NamedTuple

__all__ = ["interpreter", "is_elf", "modinfo", "without_symbols"]

_MAGIC = b"\x7fELF\x02\x01"  # of 64 bits, little-endian
_PROGRAM = struct.Struct("<IIQQQQQQ")  # type, flags, offset, vaddr, paddr, filesz, memsz, align
_SECTION = struct.Struct("<IIQQQQIIQQ")  # name, type, flags, addr, offset, size, ...
_PROGRAMS_AT = struct.Struct("<32xQ14xHH")  # of the header: e_phoff, e_phentsize, e_phnum
_SECTIONS_AT = struct.Struct("<40xQ10xHHH")  # e_shoff, e_shentsize, e_shnum, e_shstrndx
_HEADER_SIZE = 64
_PT_INTERP = 3
_SHOFF, _SHNUM = 40, 60


class _Program(NamedTuple):
    type: int
    offset: int
    size: int


def is_elf(data: bytes) -> bool:
    """Whether these are the first bytes of a 64-bit little-endian ELF file."""
    return len(data) >= _HEADER_SIZE and data.startswith(_MAGIC)


def _programs(data: bytes) -> Iterator[_Program]:
    at, size, count = _PROGRAMS_AT.unpack_from(data)
    for n in range(count):
        start = at + n * size
        if start + _PROGRAM.size > len(data):
            return
        type_, _, offset, _, _, filesz, _, _ = _PROGRAM.unpack_from(data, start)
        yield _Program(type_, offset, filesz)


def interpreter(data: bytes) -> str | None:
    """The dynamic loader that an executable asks for; ``None`` if it is static, or a library."""
    if not is_elf(data):
        return None
    for program in _programs(data):
        if program.type == _PT_INTERP:
            return data[program.offset : program.offset + program.size].rstrip(b"\0").decode()
    return None


def without_symbols(data: bytes) -> bytes:
    """An executable or a library with only what is mapped when it runs.

    Symbols, debug information and the table of sections lie behind that, and a Python that was
    built on this machine often has more of them than of everything else.  Other data stays as it
    is.
    """
    if not is_elf(data):
        return data
    programs = list(_programs(data))
    at, size, count = _PROGRAMS_AT.unpack_from(data)
    end = max([at + size * count, *(p.offset + p.size for p in programs)])
    if not programs or not _HEADER_SIZE <= end < len(data):
        return data
    kept = bytearray(data[:end])
    struct.pack_into("<Q", kept, _SHOFF, 0)
    struct.pack_into("<HH", kept, _SHNUM, 0, 0)
    return bytes(kept)


def modinfo(data: bytes) -> dict[str, str]:
    """What a kernel module says of itself (``depends``, ``vermagic``, ...); empty if nothing.

    A key that is there more than once keeps its first value.
    """
    section = _section(data, b".modinfo") if is_elf(data) else b""
    found: dict[str, str] = {}
    for entry in section.split(b"\0"):
        key, equals, value = entry.decode("utf-8", "replace").partition("=")
        if equals:
            found.setdefault(key, value)
    return found


def _section(data: bytes, wanted: bytes) -> bytes:
    try:
        at, size, count, names = _SECTIONS_AT.unpack_from(data)
        sections = [_SECTION.unpack_from(data, at + n * size) for n in range(count)]
        strings = sections[names][4]
    except (struct.error, IndexError, OverflowError):
        return b""
    for section in sections:
        name = strings + section[0]
        if data[name : data.find(b"\0", name)] == wanted:
            return data[section[4] : section[4] + section[5]]
    return b""
