"""An address space of a few pages, as the fault path and the user half see it.

It stands where :class:`guestfault.softkvm.mm.HostMm` stands otherwise, and beside it where the
kernel's own mmap, madvise and page fault handler do.  A page is in three places, each with its own
truth, and it is their disagreeing that the thread is about:

- the *page cache* holds its content, or holds nothing yet (a hole in the file);
- the *page tables* map it, writable or not, or do not;
- the *VMA* says what may be done to it, and who is asked when it is not mapped.

The rules are those of ``mm/memory.c``, ``mm/gup.c`` and ``fs/userfaultfd.c`` for shared file
memory, one step of theirs behind one preemption point.  What is not here: private mappings, huge
pages, swap, reference counts.

Whoever asks for a page for a vCPU and does not get it leaves a :class:`Failure`, so that a scenario
can compare what userspace was told with what happened.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple, Protocol

from guestfault.explore.scheduler import choose
from guestfault.linux.mmu_notifier import MmuNotifier
from guestfault.linux.userfaultfd_flags import Mode
from guestfault.memory.ram import PAGE_SIZE
from guestfault.softkvm.kvm_host import kvm_get_running_vcpu
from guestfault.softkvm.memslots import KvmMemorySlot
from guestfault.softkvm.mm import Task
from guestfault.softkvm.preempt import preemption_point
from guestfault.uapi.mman import PROT_NONE, PROT_READ, PROT_WRITE

__all__ = ["NO_VMA", "Failure", "FaultHandler", "ModelMm", "Page"]

NO_VMA = -1
"""A page's ``prot`` where nothing is mapped."""
_RW = PROT_READ | PROT_WRITE
_MODE_MISSING, _MODE_MINOR = int(Mode.MISSING), int(Mode.MINOR)
_OFFSET = PAGE_SIZE - 1


class Failure(NamedTuple):
    """An access on a vCPU's behalf that was not served: to ``hva``, by ``how``."""

    hva: int
    slots: tuple[KvmMemorySlot, ...]  # of that moment
    write: bool
    how: str

    @property
    def gpas(self) -> list[int]:
        """Where the slots had it."""
        return [
            (slot.base_gfn << 12) + self.hva - slot.userspace_addr
            for slot in self.slots
            if 0 <= self.hva - slot.userspace_addr < slot.npages * PAGE_SIZE
        ]


class FaultHandler(Protocol):
    """Who is asked for a page that is registered with it and not mapped: a userfaultfd."""

    def handle_userfault(
        self, page: Page, write: bool, nowait: bool, until: Callable[[], bool] | None
    ) -> int:
        """0 when the fault is to be tried again, or a negative errno.

        ``until`` ends the sleep as well, with EINTR.
        """


class Page:
    """One page of the address space.

    ``cached`` is its content in the page cache; ``mapped`` and ``writable`` its page table entry;
    ``error`` what faulting it in fails with, whoever asks (a file that ends, a broken memory);
    ``may_fail`` how many times it may fail or not, to be chosen each time (no memory to be had just
    now).  ``key`` names it at preemption points.
    """

    __slots__ = (
        "cached",
        "error",
        "hva",
        "key",
        "mapped",
        "may_fail",
        "prot",
        "uffd",
        "uffd_mode",
        "writable",
    )

    def __init__(self, hva: int) -> None:
        self.hva = hva
        self.key = "page", hva
        self.cached: bytearray | None = None
        self.mapped = False
        self.writable = False
        self.prot = _RW
        self.error = 0
        self.may_fail = 0
        self.uffd: FaultHandler | None = None
        self.uffd_mode = 0

    def permits(self, write: bool) -> bool:
        """Whether the VMA allows the access."""
        return self.prot > 0 and self.prot & (PROT_WRITE if write else PROT_READ) != 0

    def is_mapped_for(self, write: bool) -> bool:
        """Whether the page table entry allows the access."""
        if not self.mapped or self.prot <= 0:
            return False
        return (
            self.writable and self.prot & PROT_WRITE != 0 if write else self.prot & PROT_READ != 0
        )

    def set(self, data: bytes) -> None:
        """Put it into the page cache, with ``data`` at its start; for building a world."""
        self.cached = bytearray(data.ljust(PAGE_SIZE, b"\0"))

    def map(self) -> None:
        """Put it into the page tables, writable if the VMA is; for building a world."""
        if self.cached is None:
            self.cached = bytearray(PAGE_SIZE)
        self.mapped, self.writable = True, True


class ModelMm:
    """``pages`` pages of shared file memory from ``base`` on.  See :class:`.mm.Mm`.

    Nothing of it is mapped or cached at first.  :attr:`last_failure` holds each vCPU's, by id.
    """

    def __init__(self, base: int, pages: int) -> None:
        self.base = base
        self.pages = {hva: Page(hva) for hva in range(base, base + pages * PAGE_SIZE, PAGE_SIZE)}
        self.last_failure: dict[int, Failure] = {}
        self._notifiers: list[MmuNotifier] = []

    def page(self, hva: int) -> Page | None:
        """The page that an address is in."""
        return self.pages.get(hva & ~_OFFSET)

    # -- what KVM asks -----------------------------------------------------------------------------

    def get_user_page_fast_only(self, hva: int, write: bool) -> bool:
        """See :meth:`guestfault.softkvm.mm.Mm.get_user_page_fast_only`."""
        page = self.pages.get(hva & ~_OFFSET)
        if page is not None:
            preemption_point("get_user_page_fast_only", page.key)
            if page.is_mapped_for(write):
                return True
        self._failed(hva, write, "fast GUP")
        return False

    def get_user_pages_unlocked(
        self, hva: int, write: bool, *, nowait: bool = False, interruptible: Task | None = None
    ) -> int:
        """See :meth:`guestfault.softkvm.mm.Mm.get_user_pages_unlocked`."""
        r = self._handle_mm_fault(hva, write, nowait=nowait, interruptible=interruptible)
        if r == 0:
            self._served(hva)
        else:
            self._failed(hva, write, "GUP")
        return r

    def vma_is_valid(self, hva: int, write: bool) -> bool:
        """See :meth:`guestfault.softkvm.mm.Mm.vma_is_valid`."""
        page = self.pages.get(hva & ~_OFFSET)
        if page is None:
            return False
        preemption_point("vma_is_valid", page.key)
        return page.permits(write)

    def copy_from_user(self, hva: int, size: int) -> bytes | None:
        """See :meth:`guestfault.softkvm.mm.Mm.copy_from_user`."""
        while True:
            page = self.pages.get(hva & ~_OFFSET)
            if page is not None:
                preemption_point("copy_from_user", page.key)
                if page.is_mapped_for(False):
                    assert page.cached is not None
                    at = hva & _OFFSET
                    return bytes(page.cached[at : at + size])
            if self._handle_mm_fault(hva, False) < 0:
                self._failed(hva, False, "copy_from_user")
                return None

    def copy_to_user(self, hva: int, data: bytes) -> bool:
        """See :meth:`guestfault.softkvm.mm.Mm.copy_to_user`."""
        while True:
            page = self.pages.get(hva & ~_OFFSET)
            if page is not None:
                preemption_point("copy_to_user", page.key, True)
                if page.is_mapped_for(True):
                    assert page.cached is not None
                    at = hva & _OFFSET
                    page.cached[at : at + len(data)] = data
                    return True
            if self._handle_mm_fault(hva, True) < 0:
                self._failed(hva, True, "copy_to_user")
                return False

    def mmu_notifier_register(self, notifier: MmuNotifier) -> None:
        """See :meth:`guestfault.softkvm.mm.Mm.mmu_notifier_register`."""
        self._notifiers.append(notifier)

    def mmu_notifier_unregister(self, notifier: MmuNotifier) -> None:
        """See :meth:`guestfault.softkvm.mm.Mm.mmu_notifier_unregister`."""
        self._notifiers.remove(notifier)

    # -- the page fault handler --------------------------------------------------------------------

    def _handle_mm_fault(
        self, hva: int, write: bool, *, nowait: bool = False, interruptible: Task | None = None
    ) -> int:
        page = self.pages.get(hva & ~_OFFSET)
        if page is None:
            return -errno.EFAULT
        until = None if interruptible is None else interruptible.signal_pending
        while True:
            preemption_point("handle_mm_fault", page.key, True)
            if not page.permits(write):
                return -errno.EFAULT
            if page.error:
                return -page.error
            if page.is_mapped_for(write):
                return 0
            if page.may_fail and choose("the page can be had just now, or not", 2):
                page.may_fail -= 1
                return -errno.ENOMEM
            if not page.mapped and self.is_userfault(page):
                assert page.uffd is not None
                r = page.uffd.handle_userfault(page, write, nowait, until)
                if r < 0:
                    return r
                continue
            page.map()
            return 0

    @staticmethod
    def is_userfault(page: Page) -> bool:
        """Whether a fault on the page, which is not mapped, is its userfaultfd's business."""
        if page.uffd is None:
            return False
        minor = page.cached is not None
        return page.uffd_mode & (_MODE_MINOR if minor else _MODE_MISSING) != 0

    # -- what else changes the mappings ------------------------------------------------------------

    def populate(self, hva: int, size: int, write: bool = True) -> int:
        """``madvise(MADV_POPULATE_READ)`` or ``_WRITE``: 0 or a negative errno."""
        for at in range(hva, hva + size, PAGE_SIZE):
            r = self._handle_mm_fault(at, write)
            if r < 0:
                return r
        return 0

    def discard(self, hva: int, size: int) -> None:
        """``madvise(MADV_DONTNEED)``: out of the page tables; the page cache keeps it."""
        with self.invalidating(hva, size) as pages:
            for page in pages:
                preemption_point("zap_page_range", page.key, True)
                page.mapped = page.writable = False

    def punch_hole(self, hva: int, size: int) -> None:
        """``fallocate(FALLOC_FL_PUNCH_HOLE)``: out of the page cache, too."""
        with self.invalidating(hva, size) as pages:
            for page in pages:
                preemption_point("shmem_truncate_range", page.key, True)
                page.mapped = page.writable = False
                page.cached = None

    def protect(self, hva: int, size: int, prot: int) -> None:
        """``mprotect``; ``NO_VMA`` makes it ``munmap``."""
        with self.invalidating(hva, size) as pages:
            for page in pages:
                preemption_point("change_protection", page.key, True)
                page.prot = prot
                if prot == NO_VMA:
                    page.mapped = page.writable = False
                elif prot == PROT_NONE or not prot & PROT_WRITE:
                    page.writable = False

    def write_protect(self, hva: int) -> None:
        """Leave the page mapped, for reads only: as it is after a fork, or before write-back."""
        with self.invalidating(hva, PAGE_SIZE) as pages:
            for page in pages:
                preemption_point("write_protect", page.key, True)
                page.writable = False

    @contextmanager
    def invalidating(self, hva: int, size: int) -> Iterator[list[Page]]:
        """Change the page tables of a range inside this: the notifiers hear of it."""
        for notifier in self._notifiers:
            notifier.invalidate_range_start(hva, hva + size)
        yield [page for page in self.pages.values() if hva <= page.hva < hva + size]
        for notifier in self._notifiers:
            notifier.invalidate_range_end(hva, hva + size)

    def write_file(self, hva: int, data: bytes) -> None:
        """Write through another mapping of the same file: userspace's own, the host view."""
        page = self.pages[hva & ~_OFFSET]
        preemption_point("host view: write", page.key, True)
        if page.cached is None:
            page.cached = bytearray(PAGE_SIZE)
        at = hva & _OFFSET
        page.cached[at : at + len(data)] = data

    def read_file(self, hva: int, size: int) -> bytes:
        """Read through the host view."""
        page = self.pages[hva & ~_OFFSET]
        preemption_point("host view: read", page.key)
        at = hva & _OFFSET
        return bytes(size) if page.cached is None else bytes(page.cached[at : at + size])

    # -- what becomes known ------------------------------------------------------------------------

    def _failed(self, hva: int, write: bool, how: str) -> None:
        vcpu = kvm_get_running_vcpu()
        if vcpu is not None:
            self.last_failure[vcpu.vcpu_id] = Failure(hva, vcpu.kvm.memslots.slots, write, how)

    def _served(self, hva: int) -> None:
        vcpu = kvm_get_running_vcpu()
        if vcpu is not None:
            failure = self.last_failure.get(vcpu.vcpu_id)
            if failure is not None and failure.hva & ~_OFFSET == hva & ~_OFFSET:
                del self.last_failure[vcpu.vcpu_id]
