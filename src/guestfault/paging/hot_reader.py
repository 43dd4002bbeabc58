"""The other way's inner loop: read a fault from a userfaultfd, bring its page in, wake the sleeper.

It is here so that the two ways can be compared: a handler in Python against a compiled loop would
measure Python.  It is the handler that everybody writes: poll, read, copy or continue.
"""

from __future__ import annotations

import errno
from typing import Final

from guestfault.paging import hot_words as at
from guestfault.paging.hot import Words, _now, _record
from guestfault.paging.hot_native import (
    compiled,
    errno_location,
    ioctl,
    load8,
    load32,
    load64,
    poll,
    read,
)
from guestfault.uapi import userfaultfd as uapi

__all__ = ["serve"]

_PAGE: Final = 4096
_MESSAGE: Final = 32
_ADDRESS: Final = 16  # in a message of a page fault
_PAGE_FAULT: Final = uapi.UFFD_EVENT_PAGEFAULT
_COPY: Final = uapi.UFFDIO_COPY
_CONTINUE: Final = uapi.UFFDIO_CONTINUE
_WAKE: Final = uapi.UFFDIO_WAKE
_POLLIN: Final = 1
_EAGAIN: Final = errno.EAGAIN
_EEXIST: Final = errno.EEXIST


@compiled
def serve(w: Words, histogram: Words) -> int:
    """Serve until the stop descriptor is readable: 0; or the negative errno that ended it."""
    place = w.ctypes.data + 8 * at.SCRATCH
    while True:
        # Two struct pollfd: a descriptor and, above it, the events asked for.
        w[at.SCRATCH] = w[at.UFFD] | _POLLIN << 32
        w[at.SCRATCH + 1] = w[at.STOP_FD] | _POLLIN << 32
        if poll(place, 2, -1) < 0:
            continue
        if w[at.SCRATCH + 1] >> 48:
            return 0
        began = _now(w)
        got = read(w[at.UFFD], w[at.STAGING_AT], w[at.MESSAGES] * _MESSAGE)
        if got < 0 and load32(errno_location()) != _EAGAIN:
            return -load32(errno_location())
        message = w[at.STAGING_AT]
        for _ in range(got // _MESSAGE):
            if load8(message) == _PAGE_FAULT:
                failed = _resolve(w, load64(message + _ADDRESS) & -_PAGE)
                if failed:
                    return -failed
                w[at.SERVED] += 1
                _record(w, histogram, _now(w) - began)
            message += _MESSAGE


@compiled
def _resolve(w: Words, address: int) -> int:
    """Bring a page in and wake who sleeps in it; 0 or an errno."""
    place = w.ctypes.data + 8 * at.SCRATCH
    while True:
        w[at.SCRATCH] = address
        if w[at.SOURCE] == at.SOURCE_NONE:
            w[at.SCRATCH + 1] = _PAGE
            w[at.SCRATCH + 2] = 0
            w[at.SCRATCH + 3] = 0
            result = ioctl(w[at.UFFD], _CONTINUE, place)
        else:
            w[at.SCRATCH + 1] = w[at.SOURCE_AT] + address - w[at.GUEST_AT]
            w[at.SCRATCH + 2] = _PAGE
            w[at.SCRATCH + 3] = 0
            w[at.SCRATCH + 4] = 0
            result = ioctl(w[at.UFFD], _COPY, place)
        if result == 0:
            return 0
        failed = load32(errno_location())
        if failed == _EEXIST:  # another reader was faster, and the kernel has woken nobody for us
            w[at.SCRATCH] = address
            w[at.SCRATCH + 1] = _PAGE
            ioctl(w[at.UFFD], _WAKE, place)
            return 0
        if failed != _EAGAIN:
            return failed
