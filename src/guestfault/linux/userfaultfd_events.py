"""What a userfaultfd has to say: page faults, and changes of the address space that it watches.

The kernel queues 32-byte ``struct uffd_msg`` records (``include/uapi/linux/userfaultfd.h``).  Page
faults come always, the others only if their ``UFFD_FEATURE_EVENT_*`` was asked for.  Faults and
other events are queued apart, and ``read`` hands out the faults first: a :class:`Remove` read after
a :class:`PageFault` may have happened before it.

A thread that causes an event other than a page fault sleeps until the event is *read*.  From the
moment it begins until that thread has woken up again, the ioctls that fill pages fail with EAGAIN:
what they would fill may be about to go.  So a handler reads all there is before it resolves any of
it, and tries a fill that was refused with EAGAIN again after it has read; a wait in ``poll``
without a limit would forget it, for the fault was read already and does not come twice.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TypeAlias

from guestfault.uapi import userfaultfd as uapi

__all__ = ["MESSAGE_SIZE", "Event", "Fork", "PageFault", "Remap", "Remove", "Unmap", "decode"]

# struct uffd_msg: the event, and a union of at most three 64-bit fields.  Unpacked with struct
# because it is read once per fault, and ctypes takes five times as long.
_MESSAGE = struct.Struct("<B7xQQQ")
MESSAGE_SIZE = _MESSAGE.size
"""Bytes in one message."""


@dataclass(frozen=True, slots=True)
class PageFault:
    """A thread sleeps at ``address`` until the page is filled, or it is woken.

    ``address`` is that of the page, or of the very byte with ``UFFD_FEATURE_EXACT_ADDRESS``.

    - neither ``minor`` nor ``wp``: no page at all; :meth:`~.userfaultfd.Userfaultfd.copy` one in.
    - ``minor``: it is in the page cache, not mapped; ``continue_`` maps it.
    - ``wp``: it is write-protected; ``writeprotect`` lifts that.

    ``write`` says what the access was.  ``thread_id`` is the sleeper's (as the reader's pid
    namespace numbers it), ``None`` without ``UFFD_FEATURE_THREAD_ID``.
    """

    address: int
    write: bool
    wp: bool
    minor: bool
    thread_id: int | None


@dataclass(frozen=True, slots=True)
class Remove:
    """``MADV_DONTNEED`` or ``MADV_REMOVE`` on ``[start, end)``: its pages are to be unmapped."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Unmap:
    """``[start, end)`` was unmapped, and is registered no more."""

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Remap:
    """``mremap``: ``size`` bytes moved from ``from_`` to ``to``, and are registered there.

    An :class:`Unmap` of the old place follows, if those events were asked for.
    """

    from_: int
    to: int
    size: int


@dataclass(frozen=True, slots=True)
class Fork:
    """The process forked; ``fd`` is a new userfaultfd on the child's memory, ours to close.

    Trap: :func:`os.fork` sleeps for this event with the GIL held, so no thread of the same Python
    process can read it.  It is for handlers in another process.
    """

    fd: int


Event: TypeAlias = PageFault | Remove | Unmap | Remap | Fork


def decode(messages: bytes, thread_ids: bool = False) -> Iterator[Event]:
    """The events in what ``read`` returned: whole messages, one after the other.

    ``thread_ids``: whether ``UFFD_FEATURE_THREAD_ID`` is on, without which the field is not filled.
    """
    for event, a, b, c in _MESSAGE.iter_unpack(messages):
        match event:
            case uapi.UFFD_EVENT_PAGEFAULT:
                yield PageFault(
                    address=b,
                    write=bool(a & uapi.UFFD_PAGEFAULT_FLAG_WRITE),
                    wp=bool(a & uapi.UFFD_PAGEFAULT_FLAG_WP),
                    minor=bool(a & uapi.UFFD_PAGEFAULT_FLAG_MINOR),
                    thread_id=c & 0xFFFF_FFFF if thread_ids else None,
                )
            case uapi.UFFD_EVENT_REMOVE:
                yield Remove(a, b)
            case uapi.UFFD_EVENT_UNMAP:
                yield Unmap(a, b)
            case uapi.UFFD_EVENT_REMAP:
                yield Remap(a, b, c)
            case uapi.UFFD_EVENT_FORK:
                yield Fork(a & 0xFFFF_FFFF)
            case _:
                raise ValueError(f"unknown userfaultfd event {event:#x}")
