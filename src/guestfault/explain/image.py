"""Guest physical memory from a file: raw, or the ELF core that ``dump-guest-memory`` writes.

A raw image is memory from guest physical address 0 on, byte for byte.  (The backing file of a
guest with more than about 3 GiB is not: its memory above the PCI hole follows without the hole.)
The ELF form lists its pieces as PT_LOAD segments, whose ``p_paddr`` is the guest physical address.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from typing import NamedTuple

from guestfault.closing import Closing
from guestfault.explain.errors import ExplainError

__all__ = ["MemoryImage"]

_PT_LOAD = 1
_PN_XNUM = 0xFFFF
_MAX_SEGMENTS = 1 << 20


class _Piece(NamedTuple):
    """``size`` bytes of memory at ``gpa``, found at ``offset`` of the file."""

    gpa: int
    size: int
    offset: int


@dataclass
class MemoryImage(Closing):
    """An open image; ``read`` gives guest physical memory.  Use it as a context manager."""

    path: str
    format: str
    fd: int
    pieces: tuple[_Piece, ...]

    @classmethod
    def open(cls, path: str) -> MemoryImage:
        """Open and recognise it; raises :class:`ExplainError` if that fails."""
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except (OSError, ValueError) as error:
            raise ExplainError(path, getattr(error, "strerror", None) or str(error)) from None
        try:
            size = os.fstat(fd).st_size
            magic = os.pread(fd, 16, 0)
            if magic.startswith((b"KDUMP   ", b"makedumpfile")):
                raise ExplainError(
                    path,
                    "a kdump-compressed image, which is not supported",
                    "make one with dump-guest-memory and no -z, -l or -s",
                )
            if magic.startswith(b"\x7fELF"):
                return cls(path, "ELF core", fd, _elf_pieces(fd, path, magic))
            if not size:
                raise ExplainError(path, "an empty memory image")
            return cls(path, "raw", fd, (_Piece(0, size, 0),))
        except OSError as error:
            os.close(fd)
            raise ExplainError(path, error.strerror or str(error)) from None
        except ExplainError:
            os.close(fd)
            raise

    def read(self, gpa: int, size: int) -> bytes | None:
        """``size`` bytes at ``gpa``; None if the image does not have all of them in one piece."""
        for piece in self.pieces:
            if piece.gpa <= gpa and gpa + size <= piece.gpa + piece.size:
                data = os.pread(self.fd, size, piece.offset + gpa - piece.gpa)
                return data if len(data) == size else None
        return None

    def read_entry(self, gpa: int, size: int) -> int | None:
        """A page-table entry, as :func:`guestfault.x86.paging.walk` asks for it."""
        data = self.read(gpa, size)
        return None if data is None else int.from_bytes(data, "little")

    def close(self) -> None:
        """Close the file."""
        os.close(self.fd)


def _elf_pieces(fd: int, path: str, magic: bytes) -> tuple[_Piece, ...]:
    wide = magic[4:5] == b"\x02"
    if magic[4:6] not in (b"\x01\x01", b"\x02\x01"):
        raise ExplainError(path, "not a little-endian ELF file")
    # e_phoff, e_shoff, e_phentsize, e_phnum: elf(5)
    header = os.pread(fd, 64, 0)
    file_size = os.fstat(fd).st_size
    try:
        phoff, shoff = struct.unpack_from("<QQ" if wide else "<II", header, 32 if wide else 28)
        entry_size, count = struct.unpack_from("<HH", header, 54 if wide else 42)
        if count == _PN_XNUM:
            section = os.pread(fd, 64, shoff)
            (count,) = struct.unpack_from("<I", section, 44 if wide else 28)
        table = os.pread(fd, min(count, _MAX_SEGMENTS) * entry_size, phoff)
        pieces = []
        for at in range(0, len(table), entry_size) if entry_size else ():
            if wide:
                kind, _, offset, _, gpa, size = struct.unpack_from("<IIQQQQ", table, at)
            else:
                kind, offset, _, gpa, size = struct.unpack_from("<IIIII", table, at)
            # A file that was cut off has the first bytes of a segment, or none of it.
            size = min(size, file_size - offset)
            if kind == _PT_LOAD and size > 0:
                pieces.append(_Piece(gpa, size, offset))
    except (struct.error, OverflowError):
        raise ExplainError(path, "an ELF file whose headers are cut off") from None
    if not pieces:
        raise ExplainError(
            path, "an ELF file without PT_LOAD segments", "give what dump-guest-memory wrote"
        )
    return tuple(sorted(pieces))
