"""The host's memory as the fault path sees it: ``get_user_pages`` and the uaccess helpers.

The software KVM runs on the real memory of its own process.  What the kernel decides with page
tables in hand, we ask the kernel to decide:

- *slow GUP* is ``madvise(MADV_POPULATE_READ/WRITE)``.  It is the kernel's own faulting-in: it
  sleeps in userfaultfd, fails with the errno that GUP would fail with, and checks the protection.
- *fast GUP* must neither sleep nor fault anything in: it succeeds if the page is in our page tables
  (``/proc/self/pagemap``, bit 63) *and* the access is allowed.  A ``PROT_NONE`` page still counts
  as present there, so the protection is checked by a populate of a page that needs no populating.
  Between the two the host might take the page, and the populate would bring it back: so fast GUP
  and invalidations exclude each other, as they do in the kernel, where fast GUP runs with
  interrupts off and whoever takes a page must interrupt every processor first.
- slow GUP *that must not wait* (``FOLL_NOWAIT``) has no counterpart in user space.  What the kernel
  would find out on the way is known beforehand, as far as it is known: a page in a range that a
  userfaultfd of ours watches (:mod:`guestfault.linux.userfaultfd_ranges`), or that is swapped out,
  would have to be waited for; for any other, slow GUP is asked.  A page of a file on disk may thus
  be waited for after all, and so may one that a userfaultfd opened by other code watches.
- slow GUP *that a signal ends* (``FOLL_INTERRUPTIBLE``) has none either: the sleep of a populate
  ends with the page or with the process.  Where it may be long, which is under userfaultfd, another
  thread is put to sleep, and the one that asked waits for it, or for its signal.  The other sleeps
  on until the page comes; that is harmless, for the page will be there.
- ``copy_from_user`` and ``copy_to_user`` are :mod:`guestfault.linux.process_memory`.

All of it is behind :class:`Mm`, so that a modelled memory can take the real one's place.
"""

from __future__ import annotations

import errno
import os
import threading
from typing import Protocol

from guestfault.linux import mmu_notifier, process_memory, userfaultfd_ranges
from guestfault.linux.mapping import populate_read, populate_write
from guestfault.linux.pagemap import Pagemap
from guestfault.linux.vma_rights import VmaRightsReader
from guestfault.softkvm.preempt import Sleeper
from guestfault.softkvm.workqueue import Workqueue
from guestfault.uapi.mman import PM_PRESENT, PM_SWAP, PM_UFFD_WP

__all__ = ["HostMm", "Mm", "Task"]

PAGE_SIZE = 4096
_PRESENT, _SWAPPED, _UFFD_WP = PM_PRESENT >> 56, PM_SWAP >> 56, PM_UFFD_WP >> 56


class Task(Protocol):
    """``current``: the thread on whose behalf memory is asked for, a vCPU's."""

    @property
    def wait(self) -> Sleeper:
        """Where it sleeps; whoever gives it a signal wakes it there."""

    def signal_pending(self) -> bool:
        """Whether it has one."""


class Mm(Protocol):
    """What the fault path may ask of the host's memory.  Addresses are host virtual (hva)."""

    def get_user_page_fast_only(self, hva: int, write: bool) -> bool:
        """Whether the page is mapped in for this access.  Never sleeps, never faults it in."""

    def get_user_pages_unlocked(
        self, hva: int, write: bool, *, nowait: bool = False, interruptible: Task | None = None
    ) -> int:
        """Fault the page in; 0 or a negative errno.  May sleep, without holding the GIL.

        ``nowait``: it may not; -EAGAIN for a page that must be waited for.  ``interruptible``: the
        sleep ends with -EINTR when this task has a signal pending.
        """

    def vma_is_valid(self, hva: int, write: bool) -> bool:
        """Whether something is mapped there that may be read, and written if ``write``."""

    def copy_from_user(self, hva: int, size: int) -> bytes | None:
        """Read bytes inside one page; ``None`` if they cannot be read."""

    def copy_to_user(self, hva: int, data: bytes) -> bool:
        """Write bytes inside one page; ``False`` if they cannot be written."""

    def mmu_notifier_register(self, notifier: mmu_notifier.MmuNotifier) -> None:
        """Tell it from now on when pages are taken away."""

    def mmu_notifier_unregister(self, notifier: mmu_notifier.MmuNotifier) -> None:
        """Tell it no more."""


class _Sleep:
    """A thread's sleep for a page, and who waits for it to end."""

    def __init__(self) -> None:
        self.tasks: list[Task] = []
        self.result: int | None = None


def _populate(page: int, write: bool) -> int:
    r = populate_write(page, PAGE_SIZE) if write else populate_read(page, PAGE_SIZE)
    # madvise tells a missing mapping (ENOMEM) and a forbidden access (EINVAL) apart from a fault
    # that failed; to get_user_pages they are all EFAULT.
    return -errno.EFAULT if r in (-errno.ENOMEM, -errno.EINVAL) else r


class HostMm:
    """This process's own memory.

    A notifier of it, too (:class:`guestfault.linux.mmu_notifier.MmuNotifier`).
    """

    def __init__(self) -> None:
        self._pagemap = Pagemap()
        # Reentrant: the first populate that fails tries a mapping of its own, and unmaps it again.
        self._lock = threading.RLock()
        self._being_taken: list[tuple[int, int]] = []
        self._vmas = VmaRightsReader()
        self._sleepers = Workqueue()
        self._asleep: dict[tuple[int, bool], _Sleep] = {}
        mmu_notifier.register(self)
        self._closed = False

    def invalidate_range_start(self, start: int, end: int) -> None:
        """Fast GUP fails in the range from now on."""
        with self._lock:
            self._being_taken.append((start, end))

    def invalidate_range_end(self, start: int, end: int) -> None:
        """The range is as the host wants it."""
        with self._lock:
            self._being_taken.remove((start, end))

    def get_user_page_fast_only(self, hva: int, write: bool) -> bool:
        """See :meth:`Mm.get_user_page_fast_only`."""
        page = hva & -PAGE_SIZE
        with self._lock:
            # The flags are in the entry's last byte; past the address space there is no entry.
            flags = os.pread(self._pagemap.fd, 8, page // PAGE_SIZE * 8)[7:]
            if not flags or not flags[0] & _PRESENT or (write and flags[0] & _UFFD_WP):
                return False
            if self._being_taken and self._is_being_taken(page):
                return False
            return (populate_write if write else populate_read)(page, PAGE_SIZE) == 0

    def _is_being_taken(self, page: int) -> bool:
        return any(start < page + PAGE_SIZE and page < end for start, end in self._being_taken)

    def get_user_pages_unlocked(
        self, hva: int, write: bool, *, nowait: bool = False, interruptible: Task | None = None
    ) -> int:
        """See :meth:`Mm.get_user_pages_unlocked`."""
        page = hva & -PAGE_SIZE
        if nowait and self._must_be_waited_for(page, write):
            return -errno.EAGAIN
        if interruptible is not None and userfaultfd_ranges.sleeps_at(page):
            return self._elsewhere(page, write, interruptible)
        return _populate(page, write)

    def _must_be_waited_for(self, page: int, write: bool) -> bool:
        flags = (os.pread(self._pagemap.fd, 8, page // PAGE_SIZE * 8)[7:] or b"\0")[0]
        if flags & _PRESENT:
            return write and flags & _UFFD_WP != 0
        return flags & _SWAPPED != 0 or userfaultfd_ranges.sleeps_at(page)

    def _elsewhere(self, page: int, write: bool, task: Task) -> int:
        """Have another thread sleep; -EINTR if the task gets a signal before it is done."""
        with self._lock:
            sleep = self._asleep.get((page, write))
            if sleep is None:  # else a task was called away from it, or another waits, too
                sleep = self._asleep[page, write] = _Sleep()
                self._sleepers.schedule_work(lambda: self._sleep(page, write, sleep))
            sleep.tasks.append(task)
        while True:
            task.wait.prepare("get_user_pages_unlocked: prepare to sleep")
            if sleep.result is not None:
                return sleep.result
            if task.signal_pending():
                return -errno.EINTR
            task.wait.sleep("get_user_pages_unlocked: sleep")

    def _sleep(self, page: int, write: bool, sleep: _Sleep) -> None:
        result = _populate(page, write)
        with self._lock:
            del self._asleep[page, write]
        sleep.result = result
        for task in sleep.tasks:
            task.wait.wake_up("get_user_pages_unlocked: wake the task")

    def vma_is_valid(self, hva: int, write: bool) -> bool:
        """See :meth:`Mm.vma_is_valid`."""
        vma = self._vmas.at(hva)
        return vma is not None and vma.read and (vma.write or not write)

    def copy_from_user(self, hva: int, size: int) -> bytes | None:
        """See :meth:`Mm.copy_from_user`."""
        return process_memory.read(hva, size)

    def copy_to_user(self, hva: int, data: bytes) -> bool:
        """See :meth:`Mm.copy_to_user`."""
        return process_memory.write(hva, data)

    def mmu_notifier_register(self, notifier: mmu_notifier.MmuNotifier) -> None:
        """See :meth:`Mm.mmu_notifier_register`."""
        mmu_notifier.register(notifier)

    def mmu_notifier_unregister(self, notifier: mmu_notifier.MmuNotifier) -> None:
        """See :meth:`Mm.mmu_notifier_unregister`."""
        mmu_notifier.unregister(notifier)

    def close(self) -> None:
        """Close ``/proc/self/pagemap``.  Again is harmless."""
        if not self._closed:
            self._closed = True
            mmu_notifier.unregister(self)
            self._sleepers.close()
            self._vmas.close()
            self._pagemap.close()
