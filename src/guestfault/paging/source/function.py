"""Pages from a function."""

from __future__ import annotations

from collections.abc import Callable

from guestfault.paging.source.base import SourceError

__all__ = ["FunctionSource"]


class FunctionSource:
    """``read(offset, length)`` gives the bytes; whatever it raises is a failure of the source.

    >>> FunctionSource(8192, lambda offset, length: bytes([offset >> 12]) * length).size
    8192
    """

    def __init__(self, size: int, read: Callable[[int, int], bytes]) -> None:
        self.size = size
        self._read = read

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See :class:`~guestfault.paging.source.base.PageSource`."""
        length = len(buffer)
        try:
            data = memoryview(self._read(offset, length)).cast("B")
        except SourceError:
            raise
        except Exception as e:
            raise SourceError(offset, length, f"{type(e).__name__}: {e}") from e
        if len(data) != length:
            raise SourceError(offset, length, f"it gave {len(data)} bytes")
        buffer[:] = data
