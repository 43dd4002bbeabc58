"""Snapshots wherever they are: a directory, one packed file, or either of them at a URL's end.

A packed snapshot (:mod:`guestfault.paging.source.zstd_format`) holds all that a snapshot's
directory holds, in one file that any web server can serve.  :func:`open_snapshot` opens whichever
it is, with a source of its memory; :func:`pack` and :func:`unpack` make one of the other.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from guestfault.closing import Closing
from guestfault.guest.manifest import Manifest
from guestfault.guest.replace import replacing_file
from guestfault.guest.snapshot import (
    Snapshot,
    SnapshotError,
    chunks,
    copy,
    describe,
    load,
    read_description,
    reporting,
)
from guestfault.paging.source.base import PageSource, SourceError, close
from guestfault.paging.source.file import FileSource
from guestfault.paging.source.location import (
    DEFAULT_TIMEOUT,
    is_url,
    name_of,
    open_pages,
)
from guestfault.paging.source.resilient import Patience
from guestfault.paging.source.zstd import PackedSource
from guestfault.paging.source.zstd_format import BLOCK_SIZE, HEAD_SIZE, looks_packed
from guestfault.paging.source.zstd_writer import DEFAULT_LEVEL, Packed, write_packed

__all__ = ["OpenSnapshot", "open_snapshot", "pack", "unpack"]

_SPLIT: Final = "it is the memory of another snapshot: its manifest gives another digest"


class OpenSnapshot(Closing):
    """A snapshot, and the source of its memory, which is closed with it."""

    def __init__(
        self, snapshot: Snapshot, source: PageSource, manifest: bytes, vcpus: bytes
    ) -> None:
        self.snapshot = snapshot
        self.source = source
        self.manifest = manifest
        self.vcpus = vcpus

    def close(self) -> None:
        """Close the source."""
        close(self.source)


def open_snapshot(
    where: str | os.PathLike[str],
    memory_from: str | None = None,
    timeout: float = DEFAULT_TIMEOUT,
    patience: Patience | None = None,
) -> OpenSnapshot:
    """Open a snapshot: a directory, a packed file, or the URL of one.

    Its memory is read from ``memory_from``, where that is given: a path or URL, of raw memory or of
    a packed snapshot.  A snapshot's directory then needs no memory file.  What is remote is read
    with ``timeout`` (seconds) and ``patience``.

    Raises :class:`~guestfault.guest.snapshot.SnapshotError`, and
    :class:`~guestfault.paging.source.base.SourceError` for memory that cannot be had.
    """
    where = os.fspath(where)
    if is_url(where) or not os.path.isdir(where):
        opened = _open_packed(where, timeout, patience)
    else:
        path = Path(where)
        snapshot = load(path, memory=memory_from is None)
        manifest, vcpus = read_description(path)
        if memory_from is not None:
            source = _open(memory_from, timeout, patience)
            return _with_memory(OpenSnapshot(snapshot, source, manifest, vcpus), memory_from)
        return OpenSnapshot(snapshot, FileSource(snapshot.open_memory()), manifest, vcpus)
    if memory_from is None:
        return opened
    with opened:
        source = _open(memory_from, timeout, patience)
    instead = OpenSnapshot(opened.snapshot, source, opened.manifest, opened.vcpus)
    return _with_memory(instead, memory_from)


def _open(where: str, timeout: float, patience: Patience | None) -> PageSource:
    try:
        return open_pages(where, timeout, patience)
    except SourceError as error:
        # Where it is said once is enough.
        name = name_of(where)
        raise SnapshotError(name, error.why.removeprefix(f"{name}: ")) from error


def _open_packed(where: str, timeout: float, patience: Patience | None) -> OpenSnapshot:
    if not is_url(where) and not os.path.exists(where):
        raise SnapshotError(where, "there is no such directory or file")
    source = _open(where, timeout, patience)
    try:
        if not isinstance(source, PackedSource):
            what = "it is not a packed snapshot"
            raise SnapshotError(name_of(where), what if is_url(where) else f"{what} or a directory")
        snapshot = describe(name_of(where), source.manifest, source.vcpus)
        if snapshot.memory_size != source.size:
            what = f"its memory is {source.size} bytes instead of {snapshot.memory_size}"
            raise SnapshotError(name_of(where), what)
    except BaseException:
        close(source)
        raise
    return OpenSnapshot(snapshot, source, source.manifest, source.vcpus)


def _with_memory(opened: OpenSnapshot, memory_from: str) -> OpenSnapshot:
    """The snapshot, if the memory can be its own as far as is known."""
    name, ours = name_of(memory_from), opened.snapshot.manifest
    try:
        if isinstance(opened.source, PackedSource):
            try:
                theirs = Manifest.from_json(opened.source.manifest)
            except ValueError as error:
                raise SnapshotError(name, f"its manifest: {error}") from None
            if theirs.memory_sha256 != ours.memory_sha256:
                raise SnapshotError(name, _SPLIT)
        if opened.source.size != ours.memory_size:
            what = f"it has {opened.source.size} bytes, the snapshot's memory {ours.memory_size}"
            raise SnapshotError(name, what)
    except BaseException:
        opened.close()
        raise
    return opened


def pack(
    opened: OpenSnapshot,
    path: str | os.PathLike[str],
    block_size: int = BLOCK_SIZE,
    level: int = DEFAULT_LEVEL,
) -> Packed:
    """Write a snapshot as one packed file, in place of an older one of that name.

    The file is for its owner only, for guest memory holds secrets.  Raises
    :class:`~guestfault.guest.snapshot.SnapshotError` if that cannot be done, if the memory does not
    have its digest, or if something else has the name; what was there before is then untouched.
    """
    final = Path(os.path.realpath(path))
    _refuse_to_overwrite(final)
    # All of it is checked before any of it gets a new digest.
    opened.snapshot.verify_memory(opened.source)
    with reporting(final), replacing_file(final) as file:
        try:
            blocks = (bytes(block) for block in chunks(opened.source, block_size))
            made = write_packed(file, blocks, opened.manifest, opened.vcpus, block_size, level)
        except ValueError as error:
            raise SnapshotError(final, str(error)) from None
    return made


def unpack(opened: OpenSnapshot, path: str | os.PathLike[str]) -> Snapshot:
    """Write a snapshot as a directory; raises as :func:`guestfault.guest.snapshot.copy` does."""
    return copy(path, opened.manifest, opened.vcpus, opened.source)


def _refuse_to_overwrite(final: Path) -> None:
    if not final.exists():
        return
    beginning = b""
    if final.is_file():
        with reporting(final), open(final, "rb") as file:
            beginning = file.read(HEAD_SIZE)
    if not looks_packed(beginning):
        raise SnapshotError(final, "it exists and is not a packed snapshot, so it is not replaced")
