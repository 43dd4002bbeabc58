"""Three ways in which a page of the guest view can be absent, and how each is let in.

Which one serves depends on who must notice the absence and what the machine allows:

==============  =========================================  =======================================
view            a page is absent when                      needs
==============  =========================================  =======================================
Unpopulated     it is not in our page tables               that KVM never copies by itself, and
                                                           exits on a missing page
Registered      userfaultfd has not let it in              userfaultfd; to sleep in the page rather
                                                           than fail, one that handles kernel faults
Protected       it is PROT_NONE                            nothing, but a VMA for every hole
==============  =========================================  =======================================

The holes of an Unpopulated view are zeros to whoever does not look whether they are there: KVM's
slow GUP in an ordinary slot, and its instruction emulator in any.
A fourth, a bitmap that KVM looks at, lies over one of these: :mod:`guestfault.memory.userfault`.

A view has two states besides.  :meth:`GuestView.shut` makes every page inaccessible at once and
releases whoever sleeps in one, into an error and never into a page of zeros: it is how a VM is
stopped when its memory can no longer be brought in.  :meth:`GuestView.reopen` undoes it.
"""

from __future__ import annotations

import errno
import time
from typing import Protocol, Self

from guestfault.errors import KernelError
from guestfault.linux.userfaultfd import Feature, Mode, Userfaultfd
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.uapi.mman import PROT_NONE, PROT_READ, PROT_WRITE

__all__ = ["GuestView", "Protected", "Registered", "Unpopulated"]

_RW = PROT_READ | PROT_WRITE
_EAGAIN_PAUSE = 50e-6
_EAGAIN_LIMIT = 5.0
_MISSING_OR_MINOR = Mode.MISSING | Mode.MINOR


class GuestView(Protocol):
    """How the guest view of one :class:`~guestfault.memory.ram.GuestRam` keeps pages out."""

    @property
    def name(self) -> str:
        """For people."""

    def bring_in(self, offset: int, size: int) -> None:
        """Let pages in that are whole in the host view; those that are in already stay in.

        Wakes whoever sleeps in one of them.  Raises :class:`~guestfault.errors.KernelError`.
        """

    def shut(self) -> None:
        """Make every page inaccessible, and let those who sleep in one fail."""

    def reopen(self) -> None:
        """Undo :meth:`shut`: pages that were in are in again."""

    def close(self) -> None:
        """Give up the means.  The VM must be gone: pages that are still out would read as zeros."""


class Unpopulated:
    """Absent is what is not in our page tables.

    Pages are let in by ``MADV_POPULATE_WRITE`` and not by its READ twin: a read fault on shared
    memory maps up to 15 neighbours that are in the page cache along with the page ("fault-around",
    mm/memory.c), and a neighbour may be half filled.
    """

    name = "unpopulated"

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram

    def bring_in(self, offset: int, size: int) -> None:
        """See :meth:`GuestView.bring_in`."""
        r = self._ram.guest.populate_write(offset, size)
        if r < 0:
            raise KernelError("madvise(MADV_POPULATE_WRITE)", -r, f"offset {offset:#x}+{size:#x}")

    def shut(self) -> None:
        """See :meth:`GuestView.shut`."""
        self._ram.guest.protect(0, self._ram.size, PROT_NONE)

    def reopen(self) -> None:
        """See :meth:`GuestView.reopen`."""
        self._ram.guest.protect(0, self._ram.size, _RW)

    def close(self) -> None:
        """Nothing to give up."""


class _GuestMapping(Protocol):
    """What :class:`Registered` needs of the guest view."""

    @property
    def address(self) -> int:
        """Where it begins."""

    def protect(self, offset: int, size: int, prot: int) -> None:
        """See :meth:`guestfault.linux.mapping.Mapping.protect`."""


class _Ram(Protocol):
    """What :class:`Registered` needs of guest RAM."""

    @property
    def size(self) -> int:
        """In bytes."""

    @property
    def guest(self) -> _GuestMapping:
        """The guest view."""


class Registered:
    """Absent is what userfaultfd has not let in.

    Registered for missing *and* minor faults: with minor alone, shmem fills a page that is in no
    cache with zeros and asks nobody.  With ``sigbus`` an access fails (EFAULT in KVM_RUN) instead
    of sleeping until a handler of :attr:`uffd`'s events has let the page in.  An access that fails
    needs no privilege: then a userfaultfd for user mode only will do, which every user may have.

    Raises :class:`~guestfault.errors.Unavailable` where userfaultfd is not to be had.
    """

    def __init__(self, ram: GuestRam, *, sigbus: bool) -> None:
        required = Feature.MISSING_SHMEM | Feature.MINOR_SHMEM
        if sigbus:
            uffd = Userfaultfd.open(
                Feature.THREAD_ID, required=required | Feature.SIGBUS, user_mode_only=True
            )
        else:
            uffd = Userfaultfd.open(Feature.THREAD_ID, required=required)
        self._take_over(ram, uffd)

    @classmethod
    def over(cls, ram: _Ram, uffd: Userfaultfd) -> Self:
        """The same over a userfaultfd that is open already."""
        view = cls.__new__(cls)
        view._take_over(ram, uffd)
        return view

    def _take_over(self, ram: _Ram, uffd: Userfaultfd) -> None:
        failing = Feature.SIGBUS in uffd.features
        self.name = "userfaultfd, failing" if failing else "userfaultfd, waiting"
        self._ram = ram
        self.uffd = uffd
        try:
            uffd.register(ram.guest.address, ram.size, _MISSING_OR_MINOR)
        except BaseException:
            uffd.close()
            raise

    def bring_in(self, offset: int, size: int) -> None:
        """See :meth:`GuestView.bring_in`."""
        address, end = self._ram.guest.address + offset, self._ram.guest.address + offset + size
        deadline = 0.0
        while address < end:
            progress = self.uffd.continue_(address, end - address)
            address += progress.done
            match progress.errno:
                case 0:
                    deadline = 0.0
                case errno.EEXIST:
                    # Let in by another; the kernel has not woken those who sleep there.
                    self.uffd.wake(address, PAGE_SIZE)
                    address += PAGE_SIZE
                case errno.EAGAIN:
                    # The address space is changing, and will have changed soon.
                    deadline = deadline or time.monotonic() + _EAGAIN_LIMIT
                    if time.monotonic() > deadline:
                        raise KernelError("UFFDIO_CONTINUE", errno.EAGAIN, "for 5 seconds")
                    time.sleep(_EAGAIN_PAUSE)
                case failed:
                    raise KernelError("UFFDIO_CONTINUE", failed, f"offset {offset:#x}+{size:#x}")

    def shut(self, offset: int = 0, size: int | None = None) -> None:
        """See :meth:`GuestView.shut`; here of a part too."""
        size = self._ram.size if size is None else size
        # Woken, they make the access again, and the protection refuses it before userfaultfd sees
        # it.  To unregister instead would let them read zeros.
        self._ram.guest.protect(offset, size, PROT_NONE)
        self.uffd.wake(self._ram.guest.address + offset, size)

    def reopen(self) -> None:
        """See :meth:`GuestView.reopen`."""
        self._ram.guest.protect(0, self._ram.size, _RW)

    def close(self) -> None:
        """Close the userfaultfd."""
        self.uffd.close()


class Protected:
    """Absent is PROT_NONE.  Works everywhere; a hole costs a VMA (``vm.max_map_count``)."""

    name = "protected"

    def __init__(self, ram: GuestRam) -> None:
        self._ram = ram
        self._in = bytearray(ram.pages)
        self._shut = False
        ram.guest.protect(0, ram.size, PROT_NONE)

    def bring_in(self, offset: int, size: int) -> None:
        """See :meth:`GuestView.bring_in`."""
        first, count = offset // PAGE_SIZE, size // PAGE_SIZE
        self._in[first : first + count] = b"\1" * count
        if not self._shut:
            self._ram.guest.protect(offset, size, _RW)

    def shut(self) -> None:
        """See :meth:`GuestView.shut`."""
        self._shut = True
        self._ram.guest.protect(0, self._ram.size, PROT_NONE)

    def reopen(self) -> None:
        """See :meth:`GuestView.reopen`."""
        self._shut = False
        at = self._in.find(1)
        while at >= 0:
            end = self._in.find(0, at)
            end = len(self._in) if end < 0 else end
            self._ram.guest.protect(at * PAGE_SIZE, (end - at) * PAGE_SIZE, _RW)
            at = self._in.find(1, end)

    def close(self) -> None:
        """Nothing to give up."""
