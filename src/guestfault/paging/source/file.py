"""Pages from a file."""

from __future__ import annotations

import os

from guestfault.paging.source.base import SourceError

__all__ = ["FileSource"]


class FileSource:
    """The bytes of an open file, which the source closes.

    Raises :class:`~guestfault.paging.source.base.SourceError` at once for a descriptor that cannot
    be read at any offset.  Read with ``preadv`` and not through a mapping: a file that was
    truncated since is a short read, which is an error here, where the mapping would raise SIGBUS.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        try:
            self.size = os.lseek(fd, 0, os.SEEK_END)  # of a block device too
        except OSError as e:
            raise SourceError(0, 0, e.strerror or str(e)) from None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See :class:`~guestfault.paging.source.base.PageSource`."""
        length = len(buffer)
        done = 0
        while done < length:
            try:
                n = os.preadv(self._fd, [buffer[done:]], offset + done)
            except OSError as e:
                raise SourceError(offset, length, e.strerror or str(e)) from None
            if n == 0:
                raise SourceError(offset, length, f"the file ends after {offset + done} bytes")
            done += n

    def fileno(self) -> int:
        """The descriptor: who reads as many bytes from it as he asked for has the right ones."""
        return self._fd

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
