"""Snapshots: a stopped guest as a directory of three files.

================= ================================================================
``memory``        all slots' bytes, raw; zeros may be holes
``vcpus.json``    the registers of each vCPU (:mod:`guestfault.guest.vcpu_state`)
``manifest.json`` what it is, and digests (:mod:`guestfault.guest.manifest`)
================= ================================================================

A snapshot is restored for the sake of a short time to the first instruction, so :func:`load` reads
the manifest and the registers, looks at the memory file's *size*, and leaves the memory alone.
Whoever has the time calls :meth:`Snapshot.verify_memory`.

A snapshot appears under its name whole or not at all: it is written to a hidden directory beside
it, flushed to disk, and renamed.  The directory is for its owner only, for guest memory holds
secrets.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, TypeAlias

from guestfault.errors import GuestfaultError
from guestfault.guest.boot import entry_state, initial_memory
from guestfault.guest.expect import expect
from guestfault.guest.layout import Layout, LayoutError, Mode
from guestfault.guest.manifest import BuiltinGuest, Manifest, Slot
from guestfault.guest.vcpu_state import VcpuState
from guestfault.guest.walk import Walk
from guestfault.linux.procfs import mem_available

__all__ = ["Snapshot", "SnapshotError", "build", "load", "save"]

_MANIFEST: Final = "manifest.json"
_VCPUS: Final = "vcpus.json"
_MEMORY: Final = "memory"
_CHUNK: Final = 1 << 20
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
        with _reporting(self.path):
            return os.open(self.memory_path, os.O_RDONLY | os.O_CLOEXEC)

    def verify_memory(self) -> None:
        """Read all of the memory; raises :class:`SnapshotError` unless it has its digest."""
        digest = hashlib.sha256()
        with _reporting(self.path), open(self.memory_path, "rb", buffering=0) as file:
            while chunk := file.read(_CHUNK):
                digest.update(chunk)
        if digest.hexdigest() != self.manifest.memory_sha256:
            raise SnapshotError(self.path, "its memory does not have the digest in the manifest")


def load(path: str | os.PathLike[str]) -> Snapshot:
    """Open a snapshot; raises :class:`SnapshotError` unless everything but memory is sound.

    The cost does not depend on the memory's size.
    """
    path = Path(path)
    with _reporting(path):
        if not path.exists():
            raise SnapshotError(path, "there is no such directory")
        if not path.is_dir():
            raise SnapshotError(path, "it is not a directory")
        if not (path / _MANIFEST).exists():
            raise SnapshotError(path, f"it has no {_MANIFEST}, so it is not a snapshot")
        try:
            manifest = Manifest.from_json((path / _MANIFEST).read_bytes())
        except ValueError as error:
            raise SnapshotError(path, f"{_MANIFEST}: {error}") from None
        vcpus = _read_vcpus(path, manifest)
        size = (path / _MEMORY).stat().st_size
        if size != manifest.memory_size:
            kind = "truncated" if size < manifest.memory_size else "too long"
            what = f"its memory is {kind}: {size} bytes instead of {manifest.memory_size}"
            raise SnapshotError(path, what)
    return Snapshot(path, manifest, vcpus)


def _read_vcpus(path: Path, manifest: Manifest) -> tuple[VcpuState, ...]:
    content = (path / _VCPUS).read_bytes()
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
    final = Path(os.path.realpath(path))
    with _reporting(final):
        _refuse_to_overwrite(final)
        staging = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
        try:
            states = json.dumps([state.to_json() for state in vcpus], indent=1).encode()
            view = memoryview(memory).cast("B")
            manifest = Manifest(
                memory_size=len(view),
                memory_sha256=_write_memory(staging / _MEMORY, view),
                slots=tuple(slots) or (Slot(0, 0, len(view), 0),),
                vcpus=len(vcpus),
                vcpus_sha256=hashlib.sha256(states).hexdigest(),
                guest=guest,
            )
            text = manifest.to_json().encode()
            Manifest.from_json(text)  # what could not be read again is not worth a name
            _write(staging / _VCPUS, states)
            _write(staging / _MANIFEST, text)
            _move_into_place(staging, final)
        except ValueError as error:
            raise SnapshotError(final, f"it would be no snapshot: {error}") from None
        finally:
            shutil.rmtree(staging, ignore_errors=True)
    return Snapshot(final, manifest, tuple(vcpus))


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
def _reporting(path: Path) -> Iterator[None]:
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


def _write_memory(path: Path, memory: memoryview) -> str:
    """Write the memory file, with holes for zeros; the digest."""
    digest = hashlib.sha256()
    with open(path, "xb", buffering=0) as file:
        for at in range(0, len(memory), len(_HOLE)):
            chunk = memory[at : at + len(_HOLE)]
            digest.update(chunk)
            if chunk != _HOLE[: len(chunk)]:
                os.pwrite(file.fileno(), chunk, at)
        file.truncate(len(memory))
        os.fsync(file.fileno())
    return digest.hexdigest()


def _write(path: Path, content: bytes) -> None:
    with open(path, "xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _move_into_place(staging: Path, final: Path) -> None:
    """Rename the new snapshot to its name; the old one is gone only after that.

    Between the two renames there is none under the name, which is not half of one.
    """
    if final.exists():
        old = staging.with_name(f"{staging.name}.old")
        final.rename(old)
        try:
            staging.rename(final)
        except OSError:
            old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        staging.rename(final)
    parent = os.open(final.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
