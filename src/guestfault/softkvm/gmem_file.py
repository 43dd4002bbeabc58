"""The file behind a guest_memfd, and how KVM hears that userspace has let go of it.

The kernel's guest_memfd is an inode of its own, which no ordinary read or write reaches; ours is a
memfd.  Userspace gets a descriptor of it.  KVM has an open file description of its own, of the same
inode (opened by ``/proc/self/fd``), and a mapping, by which it and its processor reach the pages.

Of a real guest_memfd KVM holds no reference: when the last one of userspace's goes, be it a
descriptor, a copy of one in another process, or a mapping, the kernel calls ``kvm_gmem_release``
and the memory is gone.  Nobody calls us.  But a *lock* goes with it: one of an open file
description (``F_OFD_SETLK``) is held until that description's last reference is dropped, and
another description of the inode can be asked about it (``F_OFD_GETLK``).  So the file is locked
through userspace's description as it is created, and :meth:`HostGmemFile.is_open` is exact; it has
to be asked, that is all, which costs half a microsecond.

What a memfd does not refuse and a guest_memfd does: to be read, written, and mapped without
``GUEST_MEMFD_FLAG_MMAP``.  Its size is sealed.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import struct
from collections.abc import Hashable
from typing import Protocol

from guestfault.errors import KvmError
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd

__all__ = ["GmemFile", "GmemFiles", "HostGmemFiles"]

_NAME = "[kvm-gmem]"
_FLOCK = "hh4xqqi4x"  # struct flock of a 64-bit process
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


class GmemFile(Protocol):
    """KVM's side of one file."""

    @property
    def inode(self) -> Hashable:
        """What tells it from other files."""

    @property
    def address(self) -> int:
        """Where KVM has mapped all of it."""

    def is_open(self) -> bool:
        """Whether userspace still has a reference."""

    def discard(self) -> None:
        """Give the memory back: nobody can ask for its content any more."""

    def close(self) -> None:
        """Let go of it, too."""


class GmemFiles(Protocol):
    """Where the files come from."""

    def create(self, size: int) -> tuple[int, GmemFile]:
        """A file of ``size`` bytes: userspace's descriptor, and KVM's side of it."""

    def inode_of(self, fd: int) -> Hashable | None:
        """What a descriptor of userspace's is open on; ``None``: it is no descriptor."""


class HostGmemFile:
    """A memfd; ``fd`` is userspace's descriptor."""

    def __init__(self, fd: int, size: int) -> None:
        lock = struct.pack(_FLOCK, fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        fcntl.fcntl(fd, fcntl.F_OFD_SETLK, lock)
        self._lock = lock
        self._memfd = Memfd.adopt(
            os.open(f"/proc/self/fd/{fd}", os.O_RDWR | os.O_CLOEXEC), _NAME, size
        )
        try:
            self._mapping = Mapping.from_memfd(self._memfd)
        except BaseException:
            self._memfd.close()
            raise
        self._inode = _inode_of(self._memfd.fd)

    @property
    def inode(self) -> Hashable:
        """Device and inode number."""
        return self._inode

    @property
    def address(self) -> int:
        """See :attr:`GmemFile.address`."""
        return self._mapping.address

    def is_open(self) -> bool:
        """See :meth:`GmemFile.is_open`."""
        found = fcntl.fcntl(self._memfd.fd, fcntl.F_OFD_GETLK, self._lock)
        kind: int = struct.unpack(_FLOCK, found)[0]
        return kind != fcntl.F_UNLCK

    def discard(self) -> None:
        """See :meth:`GmemFile.discard`."""
        self._memfd.punch_hole(0, self._memfd.size)

    def close(self) -> None:
        """See :meth:`GmemFile.close`."""
        self._mapping.close()
        self._memfd.close()


class HostGmemFiles:
    """Files of this machine."""

    def create(self, size: int) -> tuple[int, GmemFile]:
        """Raises :class:`~guestfault.errors.KvmError`, with the errno, if there is none."""
        try:
            fd = os.memfd_create(_NAME, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            with contextlib.ExitStack() as stack:
                stack.callback(os.close, fd)
                os.ftruncate(fd, size)
                fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
                file = HostGmemFile(fd, size)
                stack.pop_all()
        except OSError as error:
            raise KvmError("KVM_CREATE_GUEST_MEMFD", error.errno or 0, f"{size:#x} bytes") from None
        return fd, file

    def inode_of(self, fd: int) -> Hashable | None:
        """See :meth:`GmemFiles.inode_of`."""
        try:
            return _inode_of(fd)
        except OSError:
            return None


def _inode_of(fd: int) -> tuple[int, int]:
    status = os.fstat(fd)
    return status.st_dev, status.st_ino
