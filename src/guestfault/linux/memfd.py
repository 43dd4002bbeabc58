"""Anonymous files for guest memory: ``memfd_create(2)``.

Guest memory must be reachable at two addresses (:mod:`guestfault.linux.mapping`), so it cannot be
anonymous memory: it is a file, without a name in any file system, whose pages live in the page
cache until the last descriptor and mapping of it are gone.

A page of the file is in one of two states: in the page cache, or nowhere (a hole, which reads as
zeros and costs no memory).  Whether it is *mapped* at some address is another matter:
``MADV_DONTNEED`` on a mapping unmaps a page and leaves it in the cache; :meth:`Memfd.punch_hole`
removes it from the cache and so from every mapping.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
from contextlib import ExitStack
from typing import Protocol, Self

from guestfault.closing import Closing
from guestfault.errors import KernelError
from guestfault.linux.ioctl import call, check, libc
from guestfault.linux.mmu_notifier import invalidating
from guestfault.uapi import mman as uapi

__all__ = ["MappedRange", "Memfd"]

_fallocate = libc.fallocate
_fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64]


class MappedRange(Protocol):
    """Where a part of the file is mapped: ``size`` bytes from ``offset`` on, at ``address``."""

    @property
    def address(self) -> int:
        """Host virtual address of the first byte."""

    @property
    def size(self) -> int:
        """Length in bytes."""

    @property
    def offset(self) -> int:
        """Offset in the file of the first byte."""


class Memfd(Closing):
    """A file of ``size`` bytes that exists only in memory.  ``name`` shows in ``/proc/PID/maps``.

    ``huge_page_size`` (bytes, a power of two such as ``2 << 20``) takes the pages from that hugetlb
    pool; every offset and length must then be a multiple of it.  ``sealable`` allows :meth:`seal`.

    Raises :class:`~guestfault.errors.KernelError`: EMFILE or ENFILE without a free descriptor,
    EINVAL or ENODEV for a huge page size that this machine has not got.

    >>> with Memfd("guest-ram", 1 << 20) as ram:
    ...     os.pwrite(ram.fd, b"hello", 4096)
    5
    """

    def __init__(
        self, name: str, size: int, *, huge_page_size: int = 0, sealable: bool = False
    ) -> None:
        flags = uapi.MFD_CLOEXEC
        if huge_page_size:
            log2 = huge_page_size.bit_length() - 1
            flags |= uapi.MFD_HUGETLB | log2 << uapi.MFD_HUGE_SHIFT
        if sealable:
            flags |= uapi.MFD_ALLOW_SEALING
        try:
            self.fd = os.memfd_create(name, flags)
        except OSError as e:
            raise KernelError("memfd_create", e.errno or 0, f"{name!r}, flags {flags:#x}") from None
        self.name = name
        self.size = 0
        self.mapped: list[MappedRange] = []
        """The live :class:`~guestfault.linux.mapping.Mapping` objects of this file."""
        try:
            self.truncate(size)
        except KernelError:
            self.close()
            raise

    @classmethod
    def adopt(cls, fd: int, name: str, size: int) -> Self:
        """Take over a file of another kind that is open already, such as a guest_memfd."""
        memfd = cls.__new__(cls)
        memfd.fd, memfd.name, memfd.size, memfd.mapped = fd, name, size, []
        return memfd

    def truncate(self, size: int) -> None:
        """Set the file's size in bytes.

        Pages past a smaller size are lost, and accesses to mappings of them are SIGBUS, in the
        kernel's own accesses EFAULT.  Raises :class:`~guestfault.errors.KernelError`, EPERM if
        sealed.
        """
        with ExitStack() as stack:
            if size < self.size:
                self._invalidate(stack, size, self.size - size)
            try:
                os.ftruncate(self.fd, size)
            except OSError as e:
                raise KernelError("ftruncate", e.errno or 0, f"{self.name}, {size:#x}") from None
        self.size = size

    def punch_hole(self, offset: int, size: int) -> None:
        """Remove pages from the file, in every mapping of it; they read as zeros afterwards.

        Trap: a userfaultfd on a mapping gets no REMOVE event for this (it does for
        ``MADV_REMOVE``), only the missing fault of the next access.  Raises
        :class:`~guestfault.errors.KernelError`, EPERM if sealed.
        """
        mode = uapi.FALLOC_FL_PUNCH_HOLE | uapi.FALLOC_FL_KEEP_SIZE
        with ExitStack() as stack:
            self._invalidate(stack, offset, size)
            result = call(_fallocate, self.fd, mode, offset, size)
        check(result, "fallocate", f"punch hole in {self.name}, {offset:#x}+{size:#x}")

    def seal(self, seals: int) -> None:
        """Add ``fcntl.F_SEAL_*`` for good (``F_ADD_SEALS``); the file must be ``sealable``.

        Raises :class:`~guestfault.errors.KernelError`: EPERM if it is not, EBUSY for F_SEAL_WRITE
        while a writable shared mapping exists.
        """
        try:
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, seals)
        except OSError as e:
            raise KernelError("F_ADD_SEALS", e.errno or 0, f"{self.name}, {seals:#x}") from None

    def close(self) -> None:
        """Close the descriptor; mappings keep the memory.  May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def _invalidate(self, stack: ExitStack, offset: int, size: int) -> None:
        """Announce that the pages of a part of the file go, wherever they are mapped."""
        for m in tuple(self.mapped):
            first = max(offset, m.offset)
            last = min(offset + size, m.offset + m.size)
            if first < last:
                shift = m.address - m.offset
                stack.enter_context(invalidating(first + shift, last + shift))
