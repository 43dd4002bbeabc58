"""A userfaultfd over the modelled address space: who sleeps in a page, and what wakes them.

It has the interface of :class:`guestfault.linux.userfaultfd.Userfaultfd`, so that the user half
that resolves faults here is the one that resolves them elsewhere
(:class:`guestfault.memory.view.Registered`).  The rules that matter are those of
``fs/userfaultfd.c``:

- a thread that faults queues itself first and then looks again whether the page is still to be
  waited for, so that a page that comes meanwhile does not leave it asleep;
- ``UFFDIO_CONTINUE`` and ``UFFDIO_COPY`` map the page, *then* wake whoever is queued in the range,
  unless they are told not to;
- on a page that is mapped already they fail with EEXIST and **wake nobody**;
- a thread that is woken makes its access anew.

What is behind a preemption point as ``"uffd"`` is the queue, all of it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from guestfault.explore.model_mm import ModelMm, Page
from guestfault.linux.userfaultfd import (
    Event,
    Feature,
    Ioctl,
    Mode,
    PageFault,
    Progress,
    Userfaultfd,
)
from guestfault.memory.ram import PAGE_SIZE
from guestfault.softkvm.preempt import preemption_point, wait

__all__ = ["ModelUserfaultfd"]

_SHARED = "uffd"
_MINOR_OR_MISSING = int(Mode.MISSING | Mode.MINOR)
# Worked out once, for each schedule makes one of these anew.
_SIGBUS, _NO_FEATURES, _NO_IOCTLS = Feature.SIGBUS, Feature(0), Ioctl(0)
_CONTINUE_AND_WAKE = Ioctl.CONTINUE | Ioctl.WAKE


class _Waiter:
    """``struct userfaultfd_wait_queue``: one thread in a page."""

    __slots__ = ("minor", "page", "read", "woken", "write")

    def __init__(self, page: Page, write: bool) -> None:
        self.page = page
        self.minor = page.cached is not None
        self.write = write
        self.read = False
        self.woken = False


class ModelUserfaultfd(Userfaultfd):
    """See :class:`~guestfault.linux.userfaultfd.Userfaultfd`.

    With ``sigbus`` an access fails instead of sleeping (``UFFD_FEATURE_SIGBUS``).
    """

    def __init__(self, mm: ModelMm, *, sigbus: bool = False) -> None:
        features = _SIGBUS if sigbus else _NO_FEATURES
        super().__init__(-1, features, features, _NO_IOCTLS)
        self._mm = mm
        self._sigbus = sigbus
        self._waiters: list[_Waiter] = []
        self._released = False

    # -- the faulting thread -----------------------------------------------------------------------

    def handle_userfault(
        self, page: Page, write: bool, nowait: bool, until: Callable[[], bool] | None
    ) -> int:
        """See :class:`guestfault.explore.model_mm.FaultHandler`."""
        if self._sigbus:
            return -errno.EFAULT  # VM_FAULT_SIGBUS, to whom there is no signal to send
        if self._released:
            return 0
        if nowait:
            return -errno.EAGAIN  # VM_FAULT_RETRY, with no queueing
        waiter = _Waiter(page, write)
        preemption_point("handle_userfault: queue", _SHARED, True)
        self._waiters.append(waiter)
        preemption_point("userfaultfd_must_wait", page.key)
        signalled = False
        if not page.mapped and self._mm.is_userfault(page):

            def go_on() -> bool:
                return waiter.woken or (until is not None and until())

            wait("handle_userfault: sleep", _SHARED, go_on)
            signalled = not waiter.woken
        else:
            preemption_point("handle_userfault: unqueue", _SHARED, True)
        if waiter in self._waiters:
            self._waiters.remove(waiter)
        return -errno.EINTR if signalled else 0

    # -- userspace ---------------------------------------------------------------------------------

    def register(self, address: int, size: int, mode: int) -> Ioctl:
        """See :meth:`.Userfaultfd.register`."""
        for at in range(address, address + size, PAGE_SIZE):
            page = self._mm.pages[at]
            preemption_point("UFFDIO_REGISTER", page.key, True)
            page.uffd, page.uffd_mode = self, int(mode) & _MINOR_OR_MISSING
        return _CONTINUE_AND_WAKE

    def unregister(self, address: int, size: int) -> None:
        """See :meth:`.Userfaultfd.unregister`."""
        for at in range(address, address + size, PAGE_SIZE):
            page = self._mm.pages[at]
            preemption_point("UFFDIO_UNREGISTER", page.key, True)
            page.uffd, page.uffd_mode = None, 0
        self.wake(address, size)

    def continue_(
        self, address: int, size: int, *, dontwake: bool = False, wp: bool = False
    ) -> Progress:
        """See :meth:`.Userfaultfd.continue_`."""
        done, failed = 0, 0
        for at in range(address, address + size, PAGE_SIZE):
            failed = self._map_cached(at, wp)
            if failed:
                break
            done += PAGE_SIZE
        if done and not dontwake:
            self.wake(address, done)
        # Some were done: that is what the ioctl tells, and the next one tells of the failure.
        return Progress(done, errno.EAGAIN if done and failed else failed)

    def _map_cached(self, at: int, wp: bool) -> int:
        page = self._mm.pages.get(at)
        if page is None or page.uffd is not self:
            return errno.ENOENT
        preemption_point("UFFDIO_CONTINUE: map", page.key, True)
        if page.mapped:
            return errno.EEXIST
        if page.cached is None:
            return errno.EFAULT
        page.map()
        page.writable = not wp
        return 0

    def wake(self, address: int, size: int) -> None:
        """See :meth:`.Userfaultfd.wake`."""
        preemption_point("wake_userfault", _SHARED, True)
        for waiter in [w for w in self._waiters if address <= w.page.hva < address + size]:
            waiter.woken = True
            self._waiters.remove(waiter)

    def readable(self) -> bool:
        """Whether there is an event to read: what ``poll`` tells."""
        return any(not waiter.read for waiter in self._waiters)

    def read_events(self) -> list[Event]:
        """See :meth:`.Userfaultfd.read_events`."""
        preemption_point("userfaultfd_read", _SHARED, True)
        events: list[Event] = []
        for waiter in self._waiters:
            if not waiter.read:
                waiter.read = True
                events.append(PageFault(waiter.page.hva, waiter.write, False, waiter.minor, None))
        return events

    def sleepers(self) -> int:
        """How many threads are queued."""
        return len(self._waiters)

    def close(self) -> None:
        """See :meth:`.Userfaultfd.close`: everybody wakes, and reads zeros."""
        self._released = True
        preemption_point("userfaultfd_release", _SHARED, True)
        for page in self._mm.pages.values():
            if page.uffd is self:
                page.uffd, page.uffd_mode = None, 0
        for waiter in self._waiters:
            waiter.woken = True
        self._waiters.clear()
