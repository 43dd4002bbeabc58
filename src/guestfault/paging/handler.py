"""The other way: vCPUs sleep in userfaultfd, and a thread brings their pages in.

It is what post-copy and lazy restore do everywhere today, and what the exits are measured against.
The vCPU's thread sleeps in the kernel, inside KVM_RUN; the handler's thread reads the fault,
brings the page in, and the ioctl that lets it in wakes the sleeper.
"""

from __future__ import annotations

import os
import select
import threading
import time
from collections.abc import Callable

from guestfault.errors import GuestfaultError
from guestfault.linux.userfaultfd import PageFault
from guestfault.memory.view import Registered
from guestfault.paging.account import FaultAccount
from guestfault.paging.pager import Pager

__all__ = ["UserfaultHandler"]


class UserfaultHandler:
    """Serves one userfaultfd from a thread of its own, from :meth:`start` to :meth:`stop`.

    If a page cannot be had, ``on_failure`` is called with the error, on the handler's thread, and
    the sleeper sleeps on: nothing wakes it into a page that is not there.  Its owner must stop the
    vCPUs; when they run again they fault again.
    """

    def __init__(
        self, pager: Pager, view: Registered, on_failure: Callable[[int, GuestfaultError], None]
    ) -> None:
        self._pager = pager
        self._view = view
        self._on_failure = on_failure
        self.account = FaultAccount()
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to serve."""
        self._thread = threading.Thread(target=self._serve, name="userfaultfd", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Serve no more.  Sleepers stay asleep; the thread has ended when this returns."""
        if self._thread is not None:
            os.eventfd_write(self._stop_fd, 1)
            self._thread.join()
            os.eventfd_read(self._stop_fd)
            self._thread = None

    def close(self) -> None:
        """Stop, and give up the descriptor."""
        self.stop()
        if self._stop_fd >= 0:
            os.close(self._stop_fd)
            self._stop_fd = -1

    def _serve(self) -> None:
        poll = select.poll()
        poll.register(self._view.uffd.fileno(), select.POLLIN)
        poll.register(self._stop_fd, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poll.poll()}
            if self._stop_fd in ready:
                return
            began = time.perf_counter_ns()
            for event in self._view.uffd.read_events():
                if isinstance(event, PageFault):
                    self._resolve(event, began)

    def _resolve(self, fault: PageFault, began: int) -> None:
        offset = fault.address - self._pager.ram.guest.address
        self.account.userfault += 1
        try:
            if not self._pager.bring_in(offset):
                self.account.again += 1
        except GuestfaultError as error:
            self._on_failure(offset, error)
            return
        self.account.latency.record(time.perf_counter_ns() - began)
