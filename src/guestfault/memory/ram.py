"""A memfd mapped twice: one view for KVM, one for us.

The two views are of the same pages.  The *guest view* is what KVM gets as a slot's
``userspace_addr``; it is the one in which pages are absent, registered with userfaultfd or not yet
mapped.  The *host view* has every page always, and is never registered: filling a page is writing
it there and then letting it into the guest view, which takes no second copy, and no reader of the
guest view can ever see half of it.

Python code touches the host view only.  It would hold the GIL while it sleeps in a registered page,
and the handler that could wake it needs the GIL.
"""

from __future__ import annotations

from guestfault.closing import Closing
from guestfault.errors import GuestfaultError
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd

__all__ = ["PAGE_SIZE", "GuestRam", "MemorySizeError"]

PAGE_SIZE = 4096


class MemorySizeError(GuestfaultError):
    """Guest RAM of a size that cannot be; ``size`` in bytes."""

    def __init__(self, size: int, why: str) -> None:
        self.size = size
        super().__init__(f"guest memory of {size} bytes: {why}")


class GuestRam(Closing):
    """``size`` bytes of guest memory; all of it reads as zeros through the host view until written.

    Raises :class:`MemorySizeError` for a size that is not a positive multiple of the page size, and
    :class:`~guestfault.errors.KernelError` if there is no address space for it.
    """

    def __init__(self, size: int, *, name: str = "guest-ram") -> None:
        if size <= 0 or size % PAGE_SIZE:
            raise MemorySizeError(size, f"use a positive multiple of {PAGE_SIZE}")
        self.size = size
        self._memfd = Memfd(name, size)
        try:
            self.host = Mapping.from_memfd(self._memfd)
            self.guest = Mapping.from_memfd(self._memfd)
            # A huge page would make 511 neighbours of a filled page present, as zeros.
            self.host.no_hugepage()
            self.guest.no_hugepage()
        except BaseException:
            self._memfd.close()
            raise
        self.bytes = self.host.view()
        """The host view: index it freely."""

    @property
    def pages(self) -> int:
        """How many pages there are."""
        return self.size // PAGE_SIZE

    def close(self) -> None:
        """Unmap both views and drop the memory.  Not while a VM has it in a slot."""
        self.guest.close()
        self.host.close()
        self._memfd.close()
