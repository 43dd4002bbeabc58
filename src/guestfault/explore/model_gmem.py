"""The file of a guest_memfd over the modelled address space: where KVM has it mapped.

It stands where :class:`guestfault.softkvm.gmem_file.HostGmemFiles` stands otherwise.  Its pages are
pages of a :class:`~guestfault.explore.model_mm.ModelMm`, at an address that no slot names; nobody
closes it.
"""

from __future__ import annotations

from collections.abc import Hashable

from guestfault.explore.model_mm import ModelMm
from guestfault.memory.ram import PAGE_SIZE
from guestfault.softkvm.gmem_file import GmemFile

__all__ = ["ModelGmemFiles"]

_FIRST_FD = 100


class _File:
    """See :class:`~guestfault.softkvm.gmem_file.GmemFile`."""

    def __init__(self, mm: ModelMm, fd: int, address: int, size: int) -> None:
        self._mm = mm
        self.inode: Hashable = fd
        self.address = address
        self._size = size

    def is_open(self) -> bool:
        """Always."""
        return True

    def discard(self) -> None:
        """Its pages are out of the page cache."""
        self._mm.punch_hole(self.address, self._size)

    def close(self) -> None:
        """Nothing is held."""


class ModelGmemFiles:
    """Files whose pages lie from ``address`` on, one behind the other."""

    def __init__(self, mm: ModelMm, address: int) -> None:
        self._mm = mm
        self._next = address
        self._fds: set[int] = set()

    def create(self, size: int) -> tuple[int, GmemFile]:
        """See :class:`~guestfault.softkvm.gmem_file.GmemFiles`."""
        fd = _FIRST_FD + len(self._fds)
        file = _File(self._mm, fd, self._next, size)
        assert size % PAGE_SIZE == 0
        self._next += size
        self._fds.add(fd)
        return fd, file

    def inode_of(self, fd: int) -> Hashable | None:
        """See :class:`~guestfault.softkvm.gmem_file.GmemFiles`."""
        return fd if fd in self._fds else None
