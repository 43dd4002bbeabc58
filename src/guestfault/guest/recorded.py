"""A snapshot's working set on disk, and the certainty that it is this snapshot's.

The order in which a guest touched its pages says something about that guest only.  Prefetching by
another's would bring in the right bytes and the wrong pages, and nobody would know why the restore
is slow.  So a working set carries the identity of its snapshot, made of the digests of its memory
and of its registers, and one that belongs elsewhere is refused.

What has the file's name is replaced if it is a working set, and left alone if it is anything else.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from guestfault.errors import GuestfaultError
from guestfault.guest.replace import replacing_file
from guestfault.guest.snapshot import Snapshot
from guestfault.memory.ram import PAGE_SIZE
from guestfault.paging.working_set import WorkingSet, looks_recorded

__all__ = ["WorkingSetError", "check_replaceable", "identity", "load_recorded", "save_recorded"]

_MEND = "record it again: guestfault run SNAPSHOT --record FILE"


class WorkingSetError(GuestfaultError):
    """A working set cannot be read, belongs to another snapshot, or cannot be written.

    ``path`` is the file, ``what`` says what is wrong.  Nothing was prefetched, or nothing was
    overwritten.
    """

    def __init__(self, path: str | os.PathLike[str], what: str) -> None:
        self.path = Path(path)
        self.what = what
        super().__init__(f"working set {os.fspath(path)}: {what}")


def identity(snapshot: Snapshot) -> bytes:
    """What a snapshot is known by: the same for every copy of it, packed or not."""
    manifest = snapshot.manifest
    slots = [(slot.guest_phys_addr, slot.memory_size, slot.offset) for slot in snapshot.slots]
    told = f"{manifest.memory_sha256} {manifest.vcpus_sha256} {sorted(slots)}"
    return hashlib.sha256(told.encode()).digest()


def load_recorded(path: str | os.PathLike[str], snapshot: Snapshot) -> WorkingSet:
    """The working set of a snapshot; raises :class:`WorkingSetError` for any other file."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise WorkingSetError(path, f"{error.strerror}; {_MEND}") from None
    try:
        recorded = WorkingSet.parse(content)
    except ValueError as error:
        raise WorkingSetError(path, f"{error}; {_MEND}") from None
    pages = snapshot.memory_size // PAGE_SIZE
    if recorded.identity != identity(snapshot) or recorded.memory_pages != pages:
        raise WorkingSetError(path, f"it was recorded from another snapshot; {_MEND}")
    return recorded


def check_replaceable(path: str | os.PathLike[str]) -> None:
    """Raises :class:`WorkingSetError` if :func:`save_recorded` would refuse the name.

    For whoever wants to know before the run rather than after it.
    """
    final = Path(os.path.realpath(path))
    if not os.access(final.parent, os.W_OK | os.X_OK):
        missing = not final.parent.is_dir()
        why = "does not exist" if missing else "cannot be written to"
        raise WorkingSetError(path, f"the directory to hold it {why}")
    beginning = b""
    try:
        if final.is_file():
            with open(final, "rb") as file:
                beginning = file.read(16)
    except OSError as error:
        raise WorkingSetError(path, str(error.strerror)) from None
    if final.exists() and not looks_recorded(beginning):
        raise WorkingSetError(path, "it exists and is not a working set, so it is not replaced")


def save_recorded(
    path: str | os.PathLike[str], snapshot: Snapshot, runs: tuple[range, ...]
) -> WorkingSet:
    """Write the working set of a snapshot, in place of an older one, whole or not at all.

    The file is for its owner only.  Raises :class:`WorkingSetError`; what was there before is then
    untouched.
    """
    recorded = WorkingSet(identity(snapshot), snapshot.memory_size // PAGE_SIZE, runs)
    check_replaceable(path)
    try:
        with replacing_file(Path(os.path.realpath(path))) as file:
            file.write(recorded.pack())
    except (OSError, ValueError) as error:
        why = error.strerror if isinstance(error, OSError) else error
        raise WorkingSetError(path, f"it cannot be written: {why}") from None
    return recorded
