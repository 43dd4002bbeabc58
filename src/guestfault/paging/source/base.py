"""What a source of pages is.

A source may block, be slow, be remote, fail and be repaired.  The one thing that it must not do is
return with anything in the buffer but the bytes of the snapshot: a page that cannot be had is an
error, never zeros.

Three errors tell what a failure is worth.  :class:`SourceError`: the source contradicts itself or
the snapshot, and waiting cures nothing.  :class:`SourceUnavailableError`: it does not answer now,
and may later; :class:`~guestfault.paging.source.resilient.ResilientSource` tries again.
:class:`SourceInterruptedError`: nothing is wrong, somebody wanted the wait to end.

A source whose reads can take long is :class:`Interruptible` besides: whoever stops a VM must not
have to wait for a server that will never answer.

A source may stand upon another, and make its own bytes of that one's (:class:`SourceUpon`): so what
is remote, what is compressed and what is patient are three sources, and each does one thing.
"""

from __future__ import annotations

import traceback
from typing import Protocol, Self, runtime_checkable

from guestfault.errors import GuestfaultError

__all__ = [
    "Interruptible",
    "PageSource",
    "SourceError",
    "SourceInterruptedError",
    "SourceUnavailableError",
    "SourceUpon",
    "check_range",
    "close",
    "interrupt",
    "let_go",
    "resume",
    "trouble",
]


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

    def at(self, offset: int, length: int, where: str = "") -> Self:
        """The same failure, as it is met by a reader of other bytes that stand on these."""
        return type(self)(offset, length, where + self.why)


class SourceUnavailableError(SourceError):
    """The source does not answer: refused, cut off, or not in time.  It may come back."""


class SourceInterruptedError(SourceError):
    """The read was ended by :meth:`Interruptible.interrupt`."""

    def __init__(self, offset: int, length: int, why: str = "the wait for it was ended") -> None:
        super().__init__(offset, length, why)


class PageSource(Protocol):
    """Guest memory as it was when the snapshot was taken, readable from several threads at once."""

    @property
    def size(self) -> int:
        """How many bytes it has."""

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """Fill ``buffer`` with the bytes from ``offset`` on; raises :class:`SourceError`."""


@runtime_checkable
class Interruptible(Protocol):
    """A source whose reads can be ended from another thread."""

    def interrupt(self) -> None:
        """End every read under way, and each that begins, with :class:`SourceInterruptedError`.

        Until :meth:`resume`.  Returns at once; may be called again, and from any thread.
        """

    def resume(self) -> None:
        """Read again."""


def interrupt(source: PageSource) -> None:
    """:meth:`Interruptible.interrupt`, of a source that can be."""
    if isinstance(source, Interruptible):
        source.interrupt()


def resume(source: PageSource) -> None:
    """:meth:`Interruptible.resume`, of a source that can be interrupted."""
    if isinstance(source, Interruptible):
        source.resume()


def close(source: PageSource) -> None:
    """Close a source that has something to close."""
    closing = getattr(source, "close", None)
    if closing is not None:
        closing()


def trouble(source: PageSource) -> SourceError | None:
    """Why some read of the source waits now for it to come back, if one does."""
    found: SourceError | None = getattr(source, "trouble", None)
    return found


class SourceUpon:
    """A source that gets its bytes from ``inner``, and is interrupted and closed with it."""

    def __init__(self, inner: PageSource) -> None:
        self._inner = inner

    @property
    def trouble(self) -> SourceError | None:
        """Why some read waits now for the source to come back, if one does."""
        return trouble(self._inner)

    def interrupt(self) -> None:
        """See :class:`Interruptible`."""
        interrupt(self._inner)

    def resume(self) -> None:
        """See :class:`Interruptible`."""
        resume(self._inner)

    def close(self) -> None:
        """Close the source underneath.  Not while it is being read."""
        close(self._inner)


def check_range(source: PageSource, offset: int, length: int) -> None:
    """Raises :class:`SourceError` for bytes that a source does not have."""
    if offset < 0 or offset + length > source.size:
        raise SourceError(offset, length, f"it has {source.size} bytes")


def let_go(error: BaseException) -> None:
    """Drop what the frames of an error's traceback, and of those that led to it, still refer to.

    Among it are pieces of the buffer that was to be filled, and so of the guest's memory, which
    could not be unmapped while somebody keeps the error.  The lines of the traceback stay.
    """
    known: set[int] = set()
    todo: list[BaseException | None] = [error]
    while todo:
        one = todo.pop()
        if one is not None and id(one) not in known:
            known.add(id(one))
            traceback.clear_frames(one.__traceback__)
            todo += (one.__cause__, one.__context__)
