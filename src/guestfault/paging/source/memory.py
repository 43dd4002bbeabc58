"""Pages from memory of our own."""

from __future__ import annotations

from guestfault.linux.mapping import Mapping
from guestfault.paging.source.base import check_range

__all__ = ["MemorySource"]


class MemorySource:
    """The bytes of a mapping that nobody can take away, which the source unmaps when it is closed.

    That is anonymous memory, or a memfd that is sealed against shrinking: reading a mapping of a
    file that somebody has truncated kills the process.
    """

    def __init__(self, mapping: Mapping) -> None:
        self._mapping = mapping
        self._bytes = mapping.view()
        self.size = mapping.size

    @property
    def address(self) -> int:
        """Where the bytes are, until the source is closed."""
        return self._mapping.address

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See :class:`~guestfault.paging.source.base.PageSource`."""
        check_range(self, offset, len(buffer))
        buffer[:] = self._bytes[offset : offset + len(buffer)]

    def close(self) -> None:
        """Unmap it."""
        self._bytes.release()
        self._mapping.close()
