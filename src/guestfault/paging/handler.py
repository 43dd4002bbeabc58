"""The other way: vCPUs sleep in userfaultfd, and a thread brings their pages in.

It is what post-copy and lazy restore do everywhere today, and what the exits are measured against.
The vCPU's thread sleeps in the kernel, inside KVM_RUN; the handler's thread reads the fault,
brings the page in, and the ioctl that lets it in wakes the sleeper.

Nothing else ends that sleep but a fatal signal: a kick does not.  So a VM whose source is slow, or
has failed, is stopped by :meth:`UserfaultHandler.release`, which makes the very pages that are
slept in inaccessible and wakes the sleepers into an access that fails.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Sequence

from guestfault.linux.readable import readable
from guestfault.linux.userfaultfd import PageFault
from guestfault.memory.ram import PAGE_SIZE
from guestfault.memory.view import Registered
from guestfault.paging.account import FaultAccount
from guestfault.paging.around import OFF, FaultAround
from guestfault.paging.pager import Pager

__all__ = ["UserfaultHandler"]


class UserfaultHandler:
    """Serves one userfaultfd from a thread of its own, from :meth:`start` to :meth:`stop`.

    If a page cannot be had, ``on_failure`` is called with the fault and the error, on the handler's
    thread, and the sleeper sleeps on: nothing wakes it into a page that is not there.  Its owner
    must stop the vCPUs and :meth:`release` them; when they run again they fault again.

    With a page it brings in up to ``fault_around`` pages (:mod:`guestfault.paging.around`), by what
    the thread that sleeps in it did before; ``parts`` are as there.
    """

    def __init__(
        self,
        pager: Pager,
        view: Registered,
        on_failure: Callable[[PageFault, Exception], None],
        *,
        fault_around: int = OFF,
        parts: Sequence[range] = (),
    ) -> None:
        self._pager = pager
        self._view = view
        self._on_failure = on_failure
        self._fault_around = fault_around
        self._parts = parts
        self._around: dict[int | None, FaultAround] = {}  # by thread
        self.account = FaultAccount()
        self._unserved: dict[int, PageFault] = {}  # by offset: the pages that are slept in
        self._released = False
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to serve; pages that :meth:`release` shut are open again.

        Faults that were left unserved are tried first: a KVM may have called its vCPU away from a
        page, and left one behind who sleeps there and will not ask again.
        """
        if self._released:
            self._view.reopen()
        self._released = False
        self._thread = threading.Thread(target=self._serve, name="userfaultfd", daemon=True)
        self._thread.start()

    def release(self) -> None:
        """From any thread: let those go who sleep now, into a failed access, never into zeros.

        Only the pages slept in are shut.  A KVM that walks the guest's page tables itself takes a
        table that it cannot read for one that maps nothing, and tells the guest so: pages that are
        in must stay in.  A vCPU that is still on its way into a page is not caught: repeat this
        until all have stopped.
        """
        # The thread may be held up in its source and not have read these.
        self._read_faults()
        for offset in tuple(self._unserved):
            self._released = True
            self._view.shut(offset, PAGE_SIZE)

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
        for fault in tuple(self._unserved.values()):
            self._resolve(fault, time.perf_counter_ns())
        for _ in readable(self._view.uffd.fileno(), self._stop_fd):
            began = time.perf_counter_ns()
            for fault in self._read_faults():
                self._resolve(fault, began)

    def _read_faults(self) -> list[PageFault]:
        faults = [event for event in self._view.uffd.read_events() if isinstance(event, PageFault)]
        self._unserved.update((self._offset(fault), fault) for fault in faults)
        return faults

    def _offset(self, fault: PageFault) -> int:
        return fault.address - self._pager.ram.guest.address

    def _resolve(self, fault: PageFault, began: int) -> None:
        offset = self._offset(fault)
        self.account.userfault += 1
        try:
            if not self._around_of(fault.thread_id).bring_in(offset):
                self.account.again += 1
        except Exception as error:
            # Whatever it is, a thread that died of it would leave the sleeper asleep for ever.
            self._on_failure(fault, error)
            return
        self._unserved.pop(offset, None)
        self.account.latency.record(time.perf_counter_ns() - began)

    def _around_of(self, thread_id: int | None) -> FaultAround:
        found = self._around.get(thread_id)
        if found is None:
            found = FaultAround(self._pager, self._fault_around, self._parts)
            self._around[thread_id] = found
        return found
