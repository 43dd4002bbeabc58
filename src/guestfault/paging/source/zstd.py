"""Pages from a packed snapshot, which may itself be anywhere.

:mod:`~guestfault.paging.source.zstd_format` is the format.  The bytes of the packed file come from
another source: a file, an HTTP server, a block device; so a compressed snapshot on a server is two
sources, one upon the other.  A block is read, decompressed and compared with its digest before any
byte of it is handed on, and then kept for a while for its other pages.
"""

from __future__ import annotations

import zstandard

from guestfault.paging.source.base import (
    PageSource,
    SourceError,
    SourceUpon,
    check_range,
)
from guestfault.paging.source.blocks import DEFAULT_CACHE, BlockCache
from guestfault.paging.source.zstd_format import (
    HEAD_SIZE,
    FormatError,
    Head,
    Index,
    digest,
    looks_packed,
)

__all__ = ["PackedSource", "is_packed"]

_PIECE = 1 << 20


class PackedSource(SourceUpon):
    """The memory of the packed snapshot whose file is ``packed``.

    ``manifest`` and ``vcpus`` are the bytes of the snapshot's two other files.  Raises
    :class:`~guestfault.paging.source.base.SourceError` with the offset in the packed file for one
    that is cut or damaged; afterwards a block that is damaged is a failure of the reads of its
    pages, and of no others.
    """

    def __init__(self, packed: PageSource, cache: int = DEFAULT_CACHE) -> None:
        super().__init__(packed)
        head_size = min(HEAD_SIZE, packed.size)
        try:
            head = Head.parse(self._read(0, head_size))
            length = head.index_offset + head.index_size
            if length > packed.size:
                why = f"it was cut: it has {packed.size} bytes of {length}"
                raise SourceError(packed.size, length - packed.size, why)
            self._index = Index.parse(head, self._read(head.index_offset, head.index_size))
        except FormatError as error:
            raise SourceError(error.offset, head_size, str(error)) from None
        self.size = head.memory_size
        self.block_size = head.block_size
        self.manifest, self.vcpus = self._index.manifest, self._index.vcpus
        self._blocks = BlockCache(self._read_block, cache // self.block_size)
        self._zeros = bytes(self.block_size)
        # One may serve one thread at a time.
        self._decompressors: list[zstandard.ZstdDecompressor] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See :class:`~guestfault.paging.source.base.PageSource`."""
        check_range(self, offset, len(buffer))
        self._blocks.read_into(offset, buffer, self.block_size)

    def _read_block(self, number: int) -> bytes:
        size = min(self.block_size, self.size - number * self.block_size)
        try:
            entry = self._index.entry(number)
        except FormatError as error:
            raise SourceError(error.offset, 0, str(error)) from None
        if entry.is_zero:
            return self._zeros[:size]
        where = f"block {number}, {entry.size} bytes at {entry.offset:#x} of the packed file, "
        try:
            frame = self._read(entry.offset, entry.size)
            # Asked first: what it says is what decompressing it would allocate.
            if zstandard.frame_content_size(frame) != size:
                raise zstandard.ZstdError("the frame has another size")
            block = self._decompress(frame, size)
        except SourceError as error:
            raise error.at(entry.offset, entry.size, where) from error
        except zstandard.ZstdError as error:
            why = f"{where}is damaged: {error}"
            raise SourceError(entry.offset, entry.size, why) from None
        if len(block) != size or digest(block) != entry.digest:
            why = f"{where}is damaged: it does not have its digest"
            raise SourceError(entry.offset, entry.size, why)
        return block

    def _decompress(self, frame: bytes, size: int) -> bytes:
        try:
            decompressor = self._decompressors.pop()
        except IndexError:
            decompressor = zstandard.ZstdDecompressor()
        block = decompressor.decompress(frame, max_output_size=size, allow_extra_data=False)
        self._decompressors.append(decompressor)
        return block

    def _read(self, offset: int, length: int) -> bytes:
        content = bytearray(length)
        with memoryview(content) as view:
            self._inner.read_into(offset, view)
        return bytes(content)


def is_packed(source: PageSource) -> bool:
    """Whether a source is the file of a packed snapshot, to judge by its beginning."""
    beginning = bytearray(min(HEAD_SIZE, source.size))
    source.read_into(0, memoryview(beginning))
    return looks_packed(bytes(beginning))
