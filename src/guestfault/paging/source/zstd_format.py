"""A packed snapshot: one file, compressed block by block, in which any block can be found at once.

The file is a series of zstd frames (RFC 8878), so ``zstd -t`` can test it; what is ours stands in
skippable frames, which zstd passes over.  Numbers are little-endian, sizes in bytes.

====== ===== =====================================================================================
offset size  the head: a skippable frame, 96 bytes in all
====== ===== =====================================================================================
0      4     0x184D2A50: a skippable frame
4      4     88: the size of its content
8      16    ``guestfault pack`` and a zero byte
24     4     1: the version of this format
28     4     the block size: a multiple of 4096
32     8     the memory size: a multiple of 4096
40     8     where the index frame's content begins
48     4     M: the size of the snapshot's ``manifest.json``
52     4     V: the size of its ``vcpus.json``
56     16    0: for later versions
72     16    the digest of the index frame's content
88     8     the first 8 bytes of the digest of bytes 8 to 87
====== ===== =====================================================================================

After the head come the blocks, each a zstd frame of its own that tells its content's size.  The
memory is cut into blocks of the block size, the last one perhaps shorter.  A block of zeros is not
in the file, and blocks of equal content are in it once.  Then comes the index, a skippable frame
(0x184D2A51, and the size of its content) with:

====== ===== =====================================================================================
offset size  the index frame's content
====== ===== =====================================================================================
0      M     ``manifest.json``, as it is
M      V     ``vcpus.json``, as it is
M+V    28 n  one entry for each block of the memory, in order: 8 bytes where its frame begins,
             4 bytes the frame's size, 16 bytes the digest of the block's uncompressed bytes.  All
             three are zero for a block of zeros.
====== ===== =====================================================================================

A digest is BLAKE2b with 16 bytes of output.  The head vouches for itself and for the index, the
index for every block: a byte that was damaged is either one that nobody reads, or found out before
anything is made of it.  The file may be followed by anything, as on a device that is larger than
it; one that ends before its index does was cut.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from typing import Final, Self

__all__ = ["BLOCK_SIZE", "HEAD_SIZE", "MAX_BLOCK_SIZE", "Entry", "Head", "Index", "digest"]
__all__ += ["FormatError", "looks_packed"]

BLOCK_SIZE: Final = 1 << 16  # unless another is asked for
MAX_BLOCK_SIZE: Final = 1 << 26  # more is no unit to bring a page in by
PAGE: Final = 4096
HEAD_SIZE: Final = 96
SIGNATURE: Final = b"guestfault pack\0"
VERSION: Final = 1
SKIPPABLE_HEAD: Final = 0x184D2A50
SKIPPABLE_INDEX: Final = 0x184D2A51

_HEAD: Final = struct.Struct("<II16sIIQQII16x16s8s")
_ENTRY: Final = struct.Struct("<QI16s")
_FRAME: Final = struct.Struct("<II")
assert _HEAD.size == HEAD_SIZE


class FormatError(ValueError):
    """Not a packed snapshot, or not one that this program reads; ``offset`` is where it fails."""

    def __init__(self, offset: int, what: str) -> None:
        self.offset = offset
        super().__init__(what)


def digest(content: bytes | bytearray | memoryview) -> bytes:
    """The 16 bytes by which content is known again."""
    return hashlib.blake2b(content, digest_size=16).digest()


def looks_packed(beginning: bytes) -> bool:
    """Whether a file that begins so is a packed snapshot, of any version."""
    return beginning[8:24] == SIGNATURE


@dataclass(frozen=True, slots=True)
class Head:
    """The head's numbers."""

    block_size: int
    memory_size: int
    index_offset: int
    manifest_size: int
    vcpus_size: int
    index_digest: bytes

    @property
    def blocks(self) -> int:
        """How many blocks the memory has."""
        return -(-self.memory_size // self.block_size)

    @property
    def index_size(self) -> int:
        """Of the index frame's content."""
        return self.manifest_size + self.vcpus_size + self.blocks * _ENTRY.size

    def pack(self) -> bytes:
        """The 96 bytes."""
        numbers = (self.block_size, self.memory_size, self.index_offset)
        sizes = (self.manifest_size, self.vcpus_size)
        frame = (SKIPPABLE_HEAD, HEAD_SIZE - _FRAME.size)
        packed = _HEAD.pack(*frame, SIGNATURE, VERSION, *numbers, *sizes, self.index_digest, b"")
        return packed[:-8] + digest(packed[8:-8])[:8]

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Read the 96 bytes; raises :class:`FormatError`."""
        if len(content) < HEAD_SIZE or not looks_packed(content):
            raise FormatError(0, "it is not a packed snapshot")
        fields = _HEAD.unpack(content[:HEAD_SIZE])
        if fields[3] != VERSION:
            raise FormatError(24, f"its version is {fields[3]}; this program reads {VERSION}")
        if digest(content[8 : HEAD_SIZE - 8])[:8] != fields[-1]:
            raise FormatError(0, "its head is damaged: it does not have its digest")
        head = cls(*fields[4:-1])
        # Whoever computes a digest can write any number: these keep the rest within bounds.
        if head.block_size % PAGE or not 0 < head.block_size <= MAX_BLOCK_SIZE:
            raise FormatError(28, f"its block size is {head.block_size}")
        if head.memory_size % PAGE or not 0 < head.memory_size < 1 << 62:
            raise FormatError(32, f"its memory size is {head.memory_size}")
        if not HEAD_SIZE + _FRAME.size <= head.index_offset < 1 << 62:
            raise FormatError(40, f"its index is at {head.index_offset}")
        return head


@dataclass(frozen=True, slots=True)
class Entry:
    """Where a block's frame is, and the block's digest.  A block of zeros has no frame."""

    offset: int
    size: int
    digest: bytes

    @property
    def is_zero(self) -> bool:
        """Whether the block is not in the file."""
        return self.size == 0


ZERO: Final = Entry(0, 0, bytes(16))


class Index:
    """The index frame's content: the snapshot's description, and an entry for each block."""

    def __init__(self, head: Head, content: bytes) -> None:
        self._head = head
        self._content = content
        self._entries = head.manifest_size + head.vcpus_size
        self.manifest = content[: head.manifest_size]
        self.vcpus = content[head.manifest_size : self._entries]

    @classmethod
    def parse(cls, head: Head, content: bytes) -> Self:
        """Raises :class:`FormatError` unless it has the digest that the head gives."""
        if len(content) != head.index_size or digest(content) != head.index_digest:
            raise FormatError(
                head.index_offset, "its index is damaged: it does not have its digest"
            )
        return cls(head, content)

    def entry(self, block: int) -> Entry:
        """Raises :class:`FormatError` for one that lies outside of the blocks' part of the file."""
        at = self._entries + block * _ENTRY.size
        entry = Entry(*_ENTRY.unpack_from(self._content, at))
        if entry.is_zero:
            if entry != ZERO:
                raise FormatError(self._head.index_offset + at, f"the entry of block {block}")
        elif entry.offset < HEAD_SIZE or entry.offset + entry.size > self._head.index_offset:
            what = f"the entry of block {block} leads out of the blocks"
            raise FormatError(self._head.index_offset + at, what)
        return entry


def pack_index(manifest: bytes, vcpus: bytes, entries: list[Entry]) -> bytes:
    """The index frame's content."""
    packed = (_ENTRY.pack(entry.offset, entry.size, entry.digest) for entry in entries)
    return b"".join((manifest, vcpus, *packed))


def skippable(magic: int, size: int) -> bytes:
    """What comes before the content of a skippable frame; raises :class:`ValueError` from 4 GiB."""
    if size >= 1 << 32:
        raise ValueError("the index would take more than 4 GiB; use larger blocks")
    return _FRAME.pack(magic, size)
