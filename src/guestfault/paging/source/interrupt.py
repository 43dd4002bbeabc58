"""Waits that another thread can end.

A thread that waits for a server is inside a system call, and only the descriptors that it polls can
wake it.  So each wait polls an eventfd beside its socket.  Once set it stays readable: whoever
comes to wait a moment later is not missed.
"""

from __future__ import annotations

import os
import select
import time
from contextlib import suppress

__all__ = ["Interrupt", "WaitInterrupted"]


class WaitInterrupted(Exception):
    """A wait ended because somebody wanted it to.  Does not leave the package: see the sources."""


class Interrupt:
    """A switch that ends every wait under way on it, and every later one, until it is cleared."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._set = False

    def set(self) -> None:
        """End all waits."""
        self._set = True
        if self._fd >= 0:
            os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        """Let them wait again."""
        self._set = False
        if self._fd >= 0:
            with suppress(BlockingIOError):  # it was not set
                os.eventfd_read(self._fd)

    def check(self) -> None:
        """Raises :class:`WaitInterrupted` while it is set."""
        if self._set:
            raise WaitInterrupted

    def sleep(self, seconds: float) -> None:
        """Sleep; raises :class:`WaitInterrupted` once it is set."""
        self.wait(-1, 0, time.monotonic() + seconds)

    def wait(self, fd: int, events: int, deadline: float) -> bool:
        """Wait until ``fd`` is ready for ``events``; ``False`` if ``deadline`` has passed first.

        ``deadline`` is of :func:`time.monotonic`.  Raises :class:`WaitInterrupted`.
        """
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        if fd >= 0:
            poll.register(fd, events)
        while True:
            self.check()
            left = deadline - time.monotonic()
            if left <= 0:
                return False
            # Rounded up: a wait of no whole millisecond would become a busy loop.
            ready = {number for number, _ in poll.poll(int(left * 1000) + 1)}
            if self._fd not in ready and ready:
                return True

    def close(self) -> None:
        """End all waits for good."""
        self._set = True
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
