"""What a source of pages is.

A source may block, be slow, be remote, fail and be repaired.  The one thing that it must not do is
return with anything in the buffer but the bytes of the snapshot: a page that cannot be had is an
error, never zeros.
"""

from __future__ import annotations

from typing import Protocol

from guestfault.errors import GuestfaultError

__all__ = ["PageSource", "SourceError"]


class SourceError(GuestfaultError):
    """A source could not deliver ``length`` bytes at ``offset``.

    Raised by a source's ``read_into``.  The vCPU that needs the page does not run on.  Mend the
    source and resume, or stop the VM.
    """

    def __init__(self, offset: int, length: int, why: str) -> None:
        self.offset = offset
        self.length = length
        self.why = why
        super().__init__(f"page source: {length} bytes at {offset:#x}: {why}")


class PageSource(Protocol):
    """Guest memory as it was when the snapshot was taken, readable from several threads at once."""

    @property
    def size(self) -> int:
        """How many bytes it has."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from ``offset`` on; raises :class:`SourceError`."""
