"""The same fault again and again: no progress, and no end unless someone notices.

KVM's documentation asks userspace that resolves and retries to guard against repeatedly receiving
the same fault (Documentation/virt/kvm/api.rst, KVM_CAP_MEMORY_FAULT_INFO).  One repeat means
nothing: the page may have been reclaimed in between.  The guard trips when one vCPU faults on the
same page with the same registers several times in a row and with nothing else in between.

RIP alone would not do.  Where others bring pages in, too, the page that failed may be there by the
time one looks which it was, and then the fault is put down to the page of the code.  A loop that
goes from page to page meets that fault at the same RIP each time, and gets on all the while: its
other registers tell.
"""

from __future__ import annotations

from collections.abc import Callable

from guestfault.errors import GuestfaultError
from guestfault.fault.access import Access
from guestfault.memory.ram import PAGE_SIZE
from guestfault.uapi.kvm_x86 import kvm_regs

__all__ = ["FaultLoopError", "RepeatGuard"]


class FaultLoopError(GuestfaultError):
    """A vCPU met the same fault ``count`` times although it was resolved each time.

    ``access`` is what failed, ``rip`` where.  What resolves the fault does not make the access
    possible: ``cause`` says what the host has against it, where that was looked into, and how it
    could be mended before the vCPU runs again.
    """

    def __init__(self, vcpu_id: int, access: Access, rip: int, count: int, cause: str = "") -> None:
        self.vcpu_id = vcpu_id
        self.access = access
        self.rip = rip
        self.count = count
        self.cause = cause
        super().__init__(
            f"vCPU {vcpu_id} at rip {rip:#x}: {access} failed {count} times in a row although its"
            " page was brought in each time" + (f": {cause}" if cause else "")
        )


class RepeatGuard:
    """Watches the faults of one vCPU.  ``limit`` is how often the same one may come in a row.

    ``read_regs`` is called only from the second fault on the same page on: reading registers costs
    more than the rest of a fault.
    """

    def __init__(self, vcpu_id: int, read_regs: Callable[[], kvm_regs], limit: int = 8) -> None:
        self._vcpu_id = vcpu_id
        self._read_regs = read_regs
        self._limit = limit
        self.progress()

    def progress(self) -> None:
        """The vCPU got on: it left KVM_RUN for another reason than a failed access."""
        self._page: int | None = None
        self._regs: bytes | None = None
        self._count = 0

    @property
    def page(self) -> int | None:
        """The page of the last fault, if nothing has come after it."""
        return self._page

    def was_at(self, page: int) -> None:
        """Faults were resolved elsewhere, no page twice in a row; the last one in this page."""
        self._page, self._regs, self._count = page, None, 1

    def saw(self, access: Access) -> None:
        """A fault was met; raises :class:`FaultLoopError` if it is the same one once too often."""
        page = None if access.gpa is None else access.gpa // PAGE_SIZE
        if page is None or page != self._page:
            self._page, self._regs, self._count = page, None, 1
            return
        regs = self._read_regs()
        before, self._regs = self._regs, bytes(regs)
        moved = before not in (None, self._regs)
        self._count = 1 if moved else self._count + 1
        if self._count > self._limit:
            raise FaultLoopError(self._vcpu_id, access, int(regs.rip), self._count)
