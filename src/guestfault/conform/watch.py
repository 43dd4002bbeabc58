"""A call that may never come back, in a thread of its own, under watch.

That an access *blocks* is a result: the sleeper is found out, kicked, and in the end released by
mending what it waits for.  Under userfaultfd the kernel says so itself, by an event, and nothing
has to be waited for; anywhere else a time limit decides.
"""

from __future__ import annotations

import contextlib
import os
import select
import threading
from collections.abc import Callable
from typing import Any

from guestfault.errors import GuestfaultError
from guestfault.linux.userfaultfd import Userfaultfd
from guestfault.linux.userfaultfd_events import PageFault

__all__ = ["PATIENCE", "SOFT_KICK", "SOFT_SLEEP", "NeverReturnedError", "Watched"]

PATIENCE = 3.0
"""Seconds after which a call that nobody explains is taken to block; kicks get as long."""

SOFT_SLEEP, SOFT_KICK = 0.05, 0.3
"""The same where the software KVM was seen asleep: for another sleep there, and for a kick."""


class NeverReturnedError(GuestfaultError):
    """A ``KVM_RUN`` that neither a kick nor the mend of its page has ended: ``what`` it was.

    Its thread is still inside.  Nothing more can be asked of this process; end it.
    """

    def __init__(self, what: str) -> None:
        self.what = what
        super().__init__(f"{what} never came back, kicked and mended; end this process")


class Watched:
    """``function()`` in a thread; :meth:`wait` for it."""

    def __init__(self, function: Callable[[], int]) -> None:
        self._function = function
        self._result = 0
        self._error: BaseException | None = None
        self._reader, self._writer = os.pipe()
        self._thread = threading.Thread(target=self._call, daemon=True)
        self._thread.start()

    def _call(self) -> None:
        try:
            self._result = self._function()
        except BaseException as error:
            self._error = error
        finally:
            os.write(self._writer, b".")

    def wait(
        self, seconds: float, uffd: Userfaultfd | None = None, base: int = 0
    ) -> dict[str, Any] | None:
        """``None`` once the call has come back, else where it sleeps.

        ``uffd`` is whose events tell that, about pages as offsets from ``base``.
        """
        poll = select.poll()
        poll.register(self._reader, select.POLLIN)
        if uffd is not None and uffd.fd >= 0:
            poll.register(uffd.fd, select.POLLIN)
        ready = poll.poll(seconds * 1000)
        if not ready:
            return {"state": self._state()}
        if any(fd == self._reader for fd, _ in ready):
            return None
        assert uffd is not None
        for event in uffd.read_events():
            if isinstance(event, PageFault):
                kind = "wp" if event.wp else "minor" if event.minor else "missing"
                page = event.address - base
                return {"event": kind, "write": event.write, "page": page}
        return self.wait(seconds, uffd, base)

    def result(self) -> int:
        """What it returned, or raises what it raised; after :meth:`wait` gave ``None``."""
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)
        if self._error is not None:
            raise self._error
        return self._result

    def _state(self) -> str:
        """``sleeping`` or ``running``: a guest or a KVM that goes round in circles."""
        with (
            contextlib.suppress(OSError),
            open(f"/proc/self/task/{self._thread.native_id}/stat") as stat,
        ):
            return "running" if stat.read().rpartition(")")[2].split()[0] == "R" else "sleeping"
        return "sleeping"
