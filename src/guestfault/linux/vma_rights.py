"""The one mapping at an address and its rights, fast enough to ask at every fault.

:mod:`guestfault.linux.vma` reads and parses the whole of ``/proc/PID/maps``, which takes as long as
there are mappings, and a guest's RAM that is let in page by page with ``mprotect`` has thousands.
Linux 6.11 and later answer for one address (``PROCMAP_QUERY``, about 1 us); older ones are asked
the slow way, with the same answer.
"""

from __future__ import annotations

import errno
import os
from ctypes import byref, sizeof
from typing import NamedTuple

from guestfault.errors import KernelError, Unavailable
from guestfault.linux import vma
from guestfault.linux.ioctl import ioctl
from guestfault.uapi import procfs as uapi

__all__ = ["VmaRights", "VmaRightsReader"]


_SIZE = sizeof(uapi.procmap_query)
_READABLE, _WRITABLE = uapi.PROCMAP_QUERY_VMA_READABLE, uapi.PROCMAP_QUERY_VMA_WRITABLE


class VmaRights(NamedTuple):
    """A mapping of this process, ``[start, end)``, and whether it may be read and written."""

    start: int
    end: int
    read: bool
    write: bool


class VmaRightsReader:
    """An open ``/proc/self/maps``.  Any thread may use it.

    Raises :class:`~guestfault.errors.Unavailable` where it cannot be opened.
    """

    def __init__(self) -> None:
        try:
            self._fd = os.open("/proc/self/maps", os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            raise Unavailable("/proc/self/maps", os.strerror(e.errno or 0), "mount /proc") from None
        self._can_query = True

    def at(self, address: int) -> VmaRights | None:
        """The mapping that ``address`` lies in, or ``None``."""
        if self._can_query:
            query = uapi.procmap_query(_SIZE, 0, address)
            result = ioctl(self._fd, uapi.PROCMAP_QUERY, byref(query))
            if result >= 0:
                flags = query.vma_flags
                return VmaRights(
                    query.vma_start, query.vma_end, flags & _READABLE != 0, flags & _WRITABLE != 0
                )
            if result == -errno.ENOENT:
                return None
            if result != -errno.ENOTTY:
                raise KernelError("PROCMAP_QUERY", -result, f"address {address:#x}")
            self._can_query = False
        found = vma.find(address)
        return None if found is None else VmaRights(found.start, found.end, found.read, found.write)

    def close(self) -> None:
        """Close the descriptor.  May be called again."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)
