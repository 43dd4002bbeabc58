"""Writing a packed snapshot (:mod:`guestfault.paging.source.zstd_format`)."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import BinaryIO, Final

import zstandard

from guestfault.paging.source.zstd_format import (
    BLOCK_SIZE,
    HEAD_SIZE,
    MAX_BLOCK_SIZE,
    PAGE,
    SKIPPABLE_INDEX,
    ZERO,
    Entry,
    Head,
    digest,
    pack_index,
    skippable,
)

__all__ = ["DEFAULT_LEVEL", "Packed", "write_packed"]

DEFAULT_LEVEL: Final = 3  # zstd's own


@dataclass(frozen=True, slots=True)
class Packed:
    """What became of a snapshot.  ``zeros`` and ``copies`` are blocks that took no room."""

    memory_size: int
    file_size: int
    blocks: int
    zeros: int
    copies: int


def write_packed(
    file: BinaryIO,
    blocks: Iterable[bytes],
    manifest: bytes,
    vcpus: bytes,
    block_size: int = BLOCK_SIZE,
    level: int = DEFAULT_LEVEL,
) -> Packed:
    """Write ``blocks`` of the memory, in order, to a file that is empty and seekable.

    Each has ``block_size`` bytes, the last perhaps fewer.  The head is written last: a file whose
    writer was killed is not taken for a packed snapshot.  Raises :class:`ValueError` for a block
    size that is no multiple of 4096 or too large, and for a level that zstd does not know.
    """
    if block_size % PAGE or not 0 < block_size <= MAX_BLOCK_SIZE:
        why = f"use a multiple of {PAGE} up to {MAX_BLOCK_SIZE}"
        raise ValueError(f"a block size of {block_size} bytes: {why}")
    if not 1 <= level <= zstandard.MAX_COMPRESSION_LEVEL:
        raise ValueError(f"level {level}: use 1 to {zstandard.MAX_COMPRESSION_LEVEL}")
    compressor = zstandard.ZstdCompressor(level=level, write_content_size=True)
    zeros, entries, known = bytes(block_size), list[Entry](), dict[bytes, Entry]()
    file.seek(HEAD_SIZE)
    at, memory_size, zero_blocks = HEAD_SIZE, 0, 0
    for block in blocks:
        memory_size += len(block)
        if block == zeros[: len(block)]:
            zero_blocks += 1
            entries.append(ZERO)
            continue
        name = digest(block)
        entry = known.get(name)
        if entry is None:
            frame = compressor.compress(block)
            file.write(frame)
            entry = known[name] = Entry(at, len(frame), name)
            at += len(frame)
        entries.append(entry)
    index = pack_index(manifest, vcpus, entries)
    file.write(skippable(SKIPPABLE_INDEX, len(index)))
    file.write(index)
    at += 8
    head = Head(block_size, memory_size, at, len(manifest), len(vcpus), digest(index))
    file.seek(0)
    file.write(head.pack())
    copies = len(entries) - zero_blocks - len(known)
    return Packed(memory_size, at + len(index), len(entries), zero_blocks, copies)
