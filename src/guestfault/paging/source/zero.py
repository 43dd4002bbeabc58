"""Pages of zeros: the memory of a guest that starts with nothing."""

from __future__ import annotations

__all__ = ["ZeroSource"]


class ZeroSource:
    """``size`` bytes of zeros, on purpose: never a substitute for a source that failed."""

    def __init__(self, size: int) -> None:
        self.size = size

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See :class:`~guestfault.paging.source.base.PageSource`."""
        buffer[:] = bytes(len(buffer))
