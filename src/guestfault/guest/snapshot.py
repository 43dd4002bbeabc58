"""Snapshots: a stopped guest as a directory of three files.

================= ================================================================
``memory``        all slots' bytes, raw; zeros may be holes
``vcpus.json``    the registers of each vCPU (:mod:`guestfault.guest.vcpu_state`)
``manifest.json`` what it is, and digests (:mod:`guestfault.guest.manifest`)
================= ================================================================

A snapshot is restored for the sake of a short time to the first instruction, so :func:`load` reads
the manifest and the registers, looks at the memory file's *size*, and leaves the memory alone.
Whoever has the time calls :meth:`Snapshot.verify_memory`.

A snapshot appears under its name whole or not at all (:mod:`guestfault.guest.replace`).  The
directory is for its owner only, for guest memory holds secrets.  :mod:`guestfault.guest.packed` is
the same in one file.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from guestfault.errors import GuestfaultError
from guestfault.guest.boot import entry_state, initial_memory
from guestfault.guest.expect import expect
from guestfault.guest.layout import Layout, LayoutError, Mode
from guestfault.guest.manifest import BuiltinGuest, Manifest, Slot
from guestfault.guest.replace import replacing_directory
from guestfault.guest.vcpu_state import VcpuState
from guestfault.guest.walk import Walk
from guestfault.linux.procfs import mem_available
from guestfault.paging.source.base import PageSource
from guestfault.paging.source.file import FileSource

__all__ = ["Snapshot", "SnapshotError", "build", "chunks", "copy", "describe", "load"]
__all__ += ["read_description", "reporting", "save"]

_MANIFEST: Final = "manifest.json"
_VCPUS: Final = "vcpus.json"
_MEMORY: Final = "memory"
_CHUNK: Final = 1 << 20
_WRONG_MEMORY: Final = "its memory does not have the digest in the manifest"
_HOLE: Final = bytes(1 << 16)  # what is looked for and left out of the memory file

ByteBuffer: TypeAlias = "bytes | bytearray | memoryview"


class SnapshotError(GuestfaultError):
    """A snapshot cannot be read, or cannot be written.

    ``path`` is the snapshot's directory, ``what`` says what is wrong.  A snapshot that was refused
    has to be taken again, or named right; nothing of it was used, and nothing was overwritten.
    """

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        self.path = Path(path)
        self.what = what
        super().__init__(f"snapshot {os.fspath(path)}: {what}")


@dataclass(frozen=True)
class Snapshot:
    """A snapshot that was found sound, memory content excepted."""

    path: Path
    manifest: Manifest
    vcpus: tuple[VcpuState, ...]

    @property
    def memory_size(self) -> int:
        """Bytes in the memory file."""
        return self.manifest.memory_size

    @property
    def slots(self) -> tuple[Slot, ...]:
        """The memory slots, and where their bytes lie in the memory file."""
        return self.manifest.slots

    @property
    def guest(self) -> BuiltinGuest | None:
        """Which built-in guest it is, if it is one."""
        return self.manifest.guest

    @property
    def memory_path(self) -> Path:
        """The memory file."""
        return self.path / _MEMORY

    def open_memory(self) -> int:
        """A new read-only file descriptor of the memory file, which the caller closes."""
        with reporting(self.path):
            return os.open(self.memory_path, os.O_RDONLY | os.O_CLOEXEC)

    def verify_memory(self, source: PageSource | None = None) -> None:
        """Read all of the memory; raises :class:`SnapshotError` unless it has its digest.

        The memory is that of ``source``, or the memory file.
        """
        if source is None:
            own = FileSource(self.open_memory())
            try:
                self.verify_memory(own)
            finally:
                own.close()
            return
        digest = hashlib.sha256()
        for chunk in chunks(source, _CHUNK):
            digest.update(chunk)
        if digest.hexdigest() != self.manifest.memory_sha256:
            raise SnapshotError(self.path, _WRONG_MEMORY)


def load(path: str | os.PathLike[str], *, memory: bool = True) -> Snapshot:
    """Open a snapshot; raises :class:`SnapshotError` unless everything but memory is sound.

    The cost does not depend on the memory's size.  Without ``memory`` there need be no memory file.
    """
    path = Path(path)
    with reporting(path):
        manifest, vcpus = read_description(path)
        snapshot = describe(path, manifest, vcpus)
        if memory:
            size = (path / _MEMORY).stat().st_size
            if size != snapshot.memory_size:
                kind = "truncated" if size < snapshot.memory_size else "too long"
                what = f"its memory is {kind}: {size} bytes instead of {snapshot.memory_size}"
                raise SnapshotError(path, what)
    return snapshot


def read_description(path: Path) -> tuple[bytes, bytes]:
    """The bytes of ``manifest.json`` and of ``vcpus.json``; raises :class:`SnapshotError`."""
    with reporting(path):
        if not path.exists():
            raise SnapshotError(path, "there is no such directory")
        if not path.is_dir():
            raise SnapshotError(path, "it is not a directory")
        if not (path / _MANIFEST).exists():
            raise SnapshotError(path, f"it has no {_MANIFEST}, so it is not a snapshot")
        return (path / _MANIFEST).read_bytes(), (path / _VCPUS).read_bytes()


def describe(path: str | os.PathLike[str], manifest: bytes, vcpus: bytes) -> Snapshot:
    """The snapshot of which these are two files; raises :class:`SnapshotError` if they are not."""
    try:
        parsed = Manifest.from_json(manifest)
    except ValueError as error:
        raise SnapshotError(path, f"{_MANIFEST}: {error}") from None
    return Snapshot(Path(path), parsed, _read_vcpus(path, vcpus, parsed))


def chunks(source: PageSource, size: int) -> Iterator[memoryview]:
    """All bytes of a source, ``size`` at a time, in a buffer that is used again each time.

    Raises :class:`~guestfault.paging.source.base.SourceError`.
    """
    buffer = memoryview(bytearray(min(size, source.size)))
    for at in range(0, source.size, size):
        chunk = buffer[: min(size, source.size - at)]
        source.read_into(at, chunk)
        yield chunk


def _read_vcpus(
    path: str | os.PathLike[str], content: bytes, manifest: Manifest
) -> tuple[VcpuState, ...]:
    if hashlib.sha256(content).hexdigest() != manifest.vcpus_sha256:
        raise SnapshotError(path, f"{_VCPUS} does not have the digest in the manifest")
    try:
        states = json.loads(content)
        if not isinstance(states, list) or len(states) != manifest.vcpus:
            raise ValueError(f"not the state of {manifest.vcpus} vCPUs")
        return tuple(VcpuState.from_json(state, f"vcpu {n}") for n, state in enumerate(states))
    except (ValueError, RecursionError) as error:
        raise SnapshotError(path, f"{_VCPUS}: {error}") from None


def save(
    path: str | os.PathLike[str],
    memory: ByteBuffer,
    vcpus: Sequence[VcpuState],
    *,
    slots: Sequence[Slot] = (),
    guest: BuiltinGuest | None = None,
) -> Snapshot:
    """Write a snapshot, in place of an older one of that name.

    ``memory`` holds the bytes of all slots; without ``slots`` it is one slot at guest physical
    address 0.  It must not be memory that is registered with userfaultfd: give the host view.
    Raises :class:`SnapshotError` if that cannot be done, or if something other than a snapshot has
    the name; what was there before is then untouched.
    """
    states = json.dumps([state.to_json() for state in vcpus], indent=1).encode()
    view = memoryview(memory).cast("B")
    pieces = (view[at : at + _CHUNK] for at in range(0, len(view), _CHUNK))
    with _replacing(path) as (final, staging):
        manifest = Manifest(
            memory_size=len(view),
            memory_sha256=_write_memory(staging / _MEMORY, pieces),
            slots=tuple(slots) or (Slot(0, 0, len(view), 0),),
            vcpus=len(vcpus),
            vcpus_sha256=hashlib.sha256(states).hexdigest(),
            guest=guest,
        )
        text = manifest.to_json().encode()
        try:
            Manifest.from_json(text)  # what could not be read again is not worth a name
        except ValueError as error:
            raise SnapshotError(final, f"it would be no snapshot: {error}") from None
        _write(staging / _VCPUS, states)
        _write(staging / _MANIFEST, text)
    return Snapshot(final, manifest, tuple(vcpus))


def copy(
    path: str | os.PathLike[str], manifest: bytes, vcpus: bytes, source: PageSource
) -> Snapshot:
    """Write a snapshot that exists elsewhere: its two files, and its memory from ``source``.

    Raises :class:`SnapshotError` as :func:`save` does, and if the memory does not have the digest
    in the manifest, and :class:`~guestfault.paging.source.base.SourceError`.
    """
    with _replacing(path) as (final, staging):
        snapshot = describe(final, manifest, vcpus)
        if _write_memory(staging / _MEMORY, chunks(source, _CHUNK)) != (
            snapshot.manifest.memory_sha256
        ):
            raise SnapshotError(final, _WRONG_MEMORY)
        _write(staging / _VCPUS, vcpus)
        _write(staging / _MANIFEST, manifest)
    return snapshot


@contextmanager
def _replacing(path: str | os.PathLike[str]) -> Iterator[tuple[Path, Path]]:
    """The snapshot's real path, and a directory to write, which then takes its place."""
    final = Path(os.path.realpath(path))
    with reporting(final):
        _refuse_to_overwrite(final)
        with replacing_directory(final) as staging:
            yield final, staging


def build(
    path: str | os.PathLike[str],
    memory_size: int,
    mode: Mode,
    walk: Walk,
    vcpus: int = 1,
    seed: int = 0,
) -> Snapshot:
    """Make a built-in guest that has not run yet, with its expected results, and save it.

    Takes twice ``memory_size`` bytes of the host's memory meanwhile.  Raises
    :class:`~guestfault.guest.layout.LayoutError` for a memory that does not suit it, and what
    :func:`save` raises.
    """
    layout = Layout(memory_size, mode, vcpus)
    available = mem_available()
    if 2 * memory_size > available:
        why = f"making it takes twice that of the host's memory, which has {available} bytes free"
        raise LayoutError(memory_size, vcpus, why)
    memory = initial_memory(layout, walk, seed)
    expected = expect(layout, walk, memory)
    final_sha256 = hashlib.sha256(expected.memory).hexdigest()
    guest = BuiltinGuest(mode, walk, seed, expected.checksums, final_sha256)
    states = [entry_state(layout, vcpu) for vcpu in range(vcpus)]
    return save(path, memory, states, guest=guest)


@contextmanager
def reporting(path: Path) -> Iterator[None]:
    """Turn an :class:`OSError` into a :class:`SnapshotError`."""
    try:
        yield
    except OSError as error:
        name = f"{Path(os.fsdecode(error.filename)).name}: " if error.filename else ""
        raise SnapshotError(path, f"{name}{error.strerror}") from error


def _refuse_to_overwrite(final: Path) -> None:
    """Only a directory that says it is a snapshot of ours, however broken, may be replaced."""
    if not final.exists():
        if not final.parent.is_dir():
            raise SnapshotError(final, "the directory to hold it does not exist")
        return
    try:
        ours = Manifest.claims((final / _MANIFEST).read_bytes())
    except OSError:
        ours = False
    if not ours:
        raise SnapshotError(final, "it exists and is not a snapshot, so it is not overwritten")


def _write_memory(path: Path, pieces: Iterable[memoryview]) -> str:
    """Write the memory file, with holes for zeros; the digest."""
    digest = hashlib.sha256()
    end = 0
    with open(path, "xb", buffering=0) as file:
        for piece in pieces:
            digest.update(piece)
            for at in range(0, len(piece), len(_HOLE)):
                part = piece[at : at + len(_HOLE)]
                if part != _HOLE[: len(part)]:
                    os.pwrite(file.fileno(), part, end + at)
            end += len(piece)
        file.truncate(end)
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
