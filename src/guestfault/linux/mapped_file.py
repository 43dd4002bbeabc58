"""The file behind a mapping: how large it is, what it holds, and the room in its file system.

``/proc/PID/maps`` names a file, but a name is not the file: a memfd has none, and what was deleted
may have been replaced.  ``/proc/PID/map_files/START-END`` leads to the very file, with
``CAP_CHECKPOINT_RESTORE`` or ``CAP_SYS_ADMIN``; without them the file is sought under its name and
among the process's descriptors, and taken only if device and inode agree.

Nothing here faults a page in or wakes a userfaultfd.  Whether the file has something at an offset
is ``lseek(SEEK_DATA)``, which for tmpfs and memfd means: in the page cache or in swap.  hugetlbfs
has no ``SEEK_DATA`` of its own (all of a file counts as data), so there only a file that is empty
or full can be answered for.
"""

from __future__ import annotations

import ctypes
import errno
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from mmap import PAGESIZE
from pathlib import Path

from guestfault.linux.ioctl import call, libc
from guestfault.linux.vma import Vma

__all__ = ["MappedFile", "in_page_cache", "mapped_file"]

_mincore = libc.mincore
_mincore.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p]


@dataclass(frozen=True, slots=True)
class MappedFile:
    """A regular file, in bytes: its ``size``, and ``capacity`` and ``free`` of its file system.

    ``capacity`` is 0 where the file system has no limit of its own, as the one that memfds live in.
    ``has_page`` tells whether the file holds something at the offset asked for, ``None`` if that
    cannot be known.
    """

    size: int
    capacity: int
    free: int
    has_page: bool | None


def mapped_file(vma: Vma, address: int, pid: int | str = "self") -> MappedFile | None:
    """The file behind ``address`` in ``vma``; ``None`` for no file, or one out of reach.

    Device files are left alone: to open one can have effects.
    """
    if not vma.inode:
        return None
    for path in _paths(vma, pid):
        try:
            if not _is_of(os.stat(path), vma):
                continue
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOCTTY)
        except OSError:
            continue
        try:
            return _look(fd, vma, address)
        except OSError:
            continue
        finally:
            os.close(fd)
    return None


def in_page_cache(address: int) -> bool | None:
    """Whether a page of a file that *this process* maps is in memory (``mincore(2)``).

    Needs no descriptor, but says yes of every page to who may not write the file.  ``None`` where
    nothing is mapped.  A page in swap is not in memory.
    """
    answer = ctypes.c_ubyte()
    if call(_mincore, address & -PAGESIZE, PAGESIZE, ctypes.byref(answer)) < 0:
        return None
    return bool(answer.value & 1)


def _paths(vma: Vma, pid: int | str) -> Iterator[str]:
    proc = f"/proc/{pid}"
    yield f"{proc}/map_files/{vma.start:x}-{vma.end:x}"
    if not vma.deleted:
        yield f"{proc}/root{vma.path}"
    try:
        descriptors = sorted(Path(proc, "fd").iterdir())
    except OSError:
        return
    yield from map(str, descriptors)


def _is_of(status: os.stat_result, vma: Vma) -> bool:
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    return stat.S_ISREG(status.st_mode) and (device, status.st_ino) == (vma.dev, vma.inode)


def _look(fd: int, vma: Vma, address: int) -> MappedFile:
    status, fs = os.fstat(fd), os.fstatvfs(fd)
    page_size = vma.page_size or PAGESIZE
    offset = vma.offset_of(address) & -page_size
    if page_size == PAGESIZE:
        has_page = _has_data(fd, offset)
    else:
        allocated = status.st_blocks * 512
        has_page = False if not allocated else True if allocated >= status.st_size else None
    return MappedFile(
        status.st_size, fs.f_blocks * fs.f_frsize, fs.f_bavail * fs.f_frsize, has_page
    )


def _has_data(fd: int, offset: int) -> bool | None:
    try:
        return os.lseek(fd, offset, os.SEEK_DATA) == offset
    except OSError as e:
        return False if e.errno == errno.ENXIO else None
