"""Resolving page faults from user space: one object for one userfaultfd.

A range registered with a userfaultfd does not get its pages from the kernel.  The thread that
touches one, in user mode or inside a system call or ``KVM_RUN``, sleeps; the fault can be read from
the descriptor; an ioctl puts the page in place and wakes the thread (``fs/userfaultfd.c``,
``mm/userfaultfd.c``, ``userfaultfd(2)``, ``ioctl_userfaultfd(2)``).

The ioctls that fill pages work on ranges and can stop in the middle.  Their outcome is a
:class:`Progress`, never an exception, for every way in which they fail is something that a handler
must be ready for:

- ``EEXIST``: a page is there already; another thread was faster.  The kernel returns *without
  waking*: whoever sleeps on that page sleeps on until :meth:`Userfaultfd.wake`.
- ``EAGAIN`` with ``done == 0``: the address space is changing (``mmap_changing``); nothing can be
  filled until the pending Remove, Unmap, Remap or Fork event has been *read* and the thread that
  caused it has woken up.  To try again without reading is an endless loop.
- ``EAGAIN`` with ``done > 0``: it stopped in the middle.  Go on at ``done``: that call says why.
- ``ENOENT``: no registered range (any more) covers this one.  ``ESRCH``: the process is exiting.
- ``EFAULT``: the source cannot be read; for ``continue_``, the page is not in the page cache.
- ``ENOSPC``, ``ENOMEM``: no huge page, or no memory, to be had.
- ``EINVAL``: unaligned, or nothing of the kind can be done to such a range.

The two-step handshake: ``UFFDIO_API`` can be done once per descriptor, and fails for a feature that
the kernel has not got.  So :meth:`Userfaultfd.open` asks one descriptor what there is, and takes a
fresh one to ask for it.
"""

from __future__ import annotations

import errno
import os
from ctypes import byref
from dataclasses import dataclass
from typing import Self

from guestfault.closing import Closing
from guestfault.errors import KernelError, Unavailable
from guestfault.linux import userfaultfd_open, userfaultfd_ranges
from guestfault.linux.ioctl import check, ioctl
from guestfault.linux.mmu_notifier import invalidating
from guestfault.linux.userfaultfd_events import (
    MESSAGE_SIZE,
    Event,
    Fork,
    PageFault,
    Remap,
    Remove,
    Unmap,
    decode,
)
from guestfault.linux.userfaultfd_flags import Feature, Ioctl, Mode, mend
from guestfault.uapi import userfaultfd as uapi

__all__ = [
    "Event",
    "Feature",
    "Fork",
    "Ioctl",
    "Mode",
    "PageFault",
    "Progress",
    "Remap",
    "Remove",
    "Unmap",
    "Userfaultfd",
]

_MESSAGES_PER_READ = 32


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a fill got: ``done`` bytes, and 0 or the positive ``errno`` that ended it.

    The kernel has one signed field for both, next to the ioctl's own errno: bytes done if any were,
    else the negative errno again, or nothing if it failed before it looked.  Read as unsigned, or
    added to an address, a failure is a length of 2**64 - 17: hence this type.
    """

    done: int
    errno: int


def _progress(result: int, field: int) -> Progress:
    return Progress(max(field, 0), -result)


class Userfaultfd(Closing):
    """An open userfaultfd, past its handshake.  Made by :meth:`open`; any thread may use it.

    ``features``: those in force.  ``offered``: all that the kernel has.  ``ioctls``: what the
    descriptor itself can do; a range's come from :meth:`register`.

    Addresses are host virtual; addresses and sizes are multiples of the page size (of the huge page
    size on hugetlb).  ``dontwake`` leaves the sleepers to a later :meth:`wake`.
    """

    def __init__(
        self,
        fd: int,
        features: Feature,
        offered: Feature,
        ioctls: Ioctl,
        user_mode_only: bool = False,
    ) -> None:
        self.fd = fd
        self.features = features
        self.offered = offered
        self.ioctls = ioctls
        self._thread_ids = Feature.THREAD_ID in features
        self._user_mode_only = user_mode_only

    @classmethod
    def open(
        cls,
        features: int = 0,
        *,
        required: int = 0,
        user_mode_only: bool = False,
        ways: tuple[str, ...] = userfaultfd_open.WAYS,
    ) -> Self:
        """A new userfaultfd, with all of ``required`` and what the kernel has of ``features``.

        With ``user_mode_only`` an access in kernel mode fails (EFAULT) instead of sleeping, KVM's
        among them.  It needs no privilege.  ``ways`` are those of
        :mod:`guestfault.linux.userfaultfd_open`.

        Raises :class:`~guestfault.errors.Unavailable` if none of the ways is open to this process,
        saying which single grant would do, and if a required feature is not there.
        """
        fd = userfaultfd_open.new(user_mode_only, ways)
        try:
            offered, ioctls = _handshake(fd, 0)
            if lacking := Feature(required & ~int(offered)):
                raise Unavailable("userfaultfd", f"no {lacking!r} in this kernel", mend(lacking))
            wanted = Feature(features | required) & offered
            if wanted:
                os.close(fd)
                fd = -1
                fd = userfaultfd_open.new(user_mode_only, ways)
                _handshake(fd, wanted)
        except Unavailable:
            if fd >= 0:
                os.close(fd)
            raise
        return cls(fd, wanted, offered, ioctls, user_mode_only)

    def register(self, address: int, size: int, mode: int) -> Ioctl:
        """Take over the faults of a range, of the kinds in ``mode``; what can be done to it.

        Trap: with MINOR alone, shmem fills a page that is in no cache with zeros and asks nobody.
        Register ``Mode.MISSING | Mode.MINOR``: the fault says which of the two it is.

        Raises :class:`~guestfault.errors.KernelError`: EBUSY if another userfaultfd has part of it,
        EINVAL if nothing is mapped there or it is not that kind of memory, EPERM if the file is not
        open for writing.
        """
        arg = uapi.uffdio_register(uapi.uffdio_range(address, size), mode, 0)
        result = ioctl(self.fd, uapi.UFFDIO_REGISTER, byref(arg))
        check(result, "UFFDIO_REGISTER", f"{address:#x}+{size:#x}, {Mode(mode)!r}")
        if not self._user_mode_only and Feature.SIGBUS not in self.features:
            userfaultfd_ranges.note(self.fd, address, size)
        return Ioctl(arg.ioctls)

    def unregister(self, address: int, size: int) -> None:
        """Give a range back to the kernel, which fills pages with zeros again; wakes sleepers.

        Raises :class:`~guestfault.errors.KernelError`, EINVAL if nothing suitable is mapped there.
        """
        arg = uapi.uffdio_range(address, size)
        result = ioctl(self.fd, uapi.UFFDIO_UNREGISTER, byref(arg))
        check(result, "UFFDIO_UNREGISTER", f"{address:#x}+{size:#x}")
        userfaultfd_ranges.forget(self.fd, address, size)

    def wake(self, address: int, size: int) -> None:
        """Wake whoever sleeps in a range, to make the access again and fault again if it must.

        Raises :class:`~guestfault.errors.KernelError`, EINVAL for a bad range.
        """
        arg = uapi.uffdio_range(address, size)
        result = ioctl(self.fd, uapi.UFFDIO_WAKE, byref(arg))
        check(result, "UFFDIO_WAKE", f"{address:#x}+{size:#x}")

    def copy(
        self, dst: int, src: int, size: int, *, dontwake: bool = False, wp: bool = False
    ) -> Progress:
        """Fill missing pages at ``dst`` with a copy of those at ``src``; wake (``UFFDIO_COPY``).

        A page appears whole or not at all.  ``wp`` maps it write-protected (range registered WP).
        """
        mode = dontwake * uapi.UFFDIO_COPY_MODE_DONTWAKE | wp * uapi.UFFDIO_COPY_MODE_WP
        arg = uapi.uffdio_copy(dst, src, size, mode, 0)
        return _progress(ioctl(self.fd, uapi.UFFDIO_COPY, byref(arg)), arg.copy)

    def zeropage(self, address: int, size: int, *, dontwake: bool = False) -> Progress:
        """Fill missing pages with zeros; wake (``UFFDIO_ZEROPAGE``).  EINVAL on hugetlb."""
        mode = dontwake * uapi.UFFDIO_ZEROPAGE_MODE_DONTWAKE
        arg = uapi.uffdio_zeropage(uapi.uffdio_range(address, size), mode, 0)
        return _progress(ioctl(self.fd, uapi.UFFDIO_ZEROPAGE, byref(arg)), arg.zeropage)

    def continue_(
        self, address: int, size: int, *, dontwake: bool = False, wp: bool = False
    ) -> Progress:
        """Map pages that are in the page cache; wake (``UFFDIO_CONTINUE``).

        EFAULT for a page that is not in the cache; nothing is made up for it.  ``wp`` as in
        :meth:`copy` (Linux 6.4).
        """
        mode = dontwake * uapi.UFFDIO_CONTINUE_MODE_DONTWAKE | wp * uapi.UFFDIO_CONTINUE_MODE_WP
        arg = uapi.uffdio_continue(uapi.uffdio_range(address, size), mode, 0)
        return _progress(ioctl(self.fd, uapi.UFFDIO_CONTINUE, byref(arg)), arg.mapped)

    def poison(self, address: int, size: int, *, dontwake: bool = False) -> Progress:
        """Make accesses to missing pages fail as on broken memory (``UFFDIO_POISON``, 6.6).

        SIGBUS for an instruction, EHWPOISON for ``get_user_pages``: the page that is lost for good.
        """
        mode = dontwake * uapi.UFFDIO_POISON_MODE_DONTWAKE
        arg = uapi.uffdio_poison(uapi.uffdio_range(address, size), mode, 0)
        return _progress(ioctl(self.fd, uapi.UFFDIO_POISON, byref(arg)), arg.updated)

    def move(self, dst: int, src: int, size: int, *, dontwake: bool = False) -> Progress:
        """Move private anonymous pages from ``src`` to missing ones (``UFFDIO_MOVE``, 6.8).

        No copy is made; ``src`` is missing afterwards.  EBUSY for a page that is shared or pinned.
        """
        mode = dontwake * uapi.UFFDIO_MOVE_MODE_DONTWAKE
        arg = uapi.uffdio_move(dst, src, size, mode, 0)
        with invalidating(src, src + size):
            return _progress(ioctl(self.fd, uapi.UFFDIO_MOVE, byref(arg)), arg.move)

    def writeprotect(
        self, address: int, size: int, *, protect: bool, dontwake: bool = False
    ) -> Progress:
        """Write-protect pages, or lift that and wake (``UFFDIO_WRITEPROTECT``); all or nothing.

        ``dontwake`` is for lifting only: protecting wakes nobody, and the two together are EINVAL.
        """
        mode = protect * uapi.UFFDIO_WRITEPROTECT_MODE_WP
        mode |= dontwake * uapi.UFFDIO_WRITEPROTECT_MODE_DONTWAKE
        arg = uapi.uffdio_writeprotect(uapi.uffdio_range(address, size), mode)
        with invalidating(address, address + size):
            result = ioctl(self.fd, uapi.UFFDIO_WRITEPROTECT, byref(arg))
        return _progress(result, size if result == 0 else 0)

    def read_events(self) -> list[Event]:
        """What has happened, at most 32 events at a time; ``[]`` at once if nothing has.

        The descriptor is readable (``poll``) when there is something.  Each event goes to one
        reader.
        """
        try:
            messages = os.read(self.fd, _MESSAGES_PER_READ * MESSAGE_SIZE)
        except BlockingIOError:
            return []
        except OSError as e:
            raise KernelError("read", e.errno or 0, "userfaultfd") from None
        return list(decode(messages, self._thread_ids))

    def fileno(self) -> int:
        """The descriptor, for ``select`` and its kin."""
        return self.fd

    def close(self) -> None:
        """Close the descriptor; with the last copy of it, every range goes back to the kernel.

        Trap: closing wakes all who sleep, and they read *zeros*.  While a guest runs or waits, that
        is silent corruption: stop its vCPUs, or make the range inaccessible, before this.

        May be called again.
        """
        if self.fd >= 0:
            userfaultfd_ranges.forget(self.fd)
            os.close(self.fd)
            self.fd = -1


def _handshake(fd: int, features: int) -> tuple[Feature, Ioctl]:
    """``UFFDIO_API``: what the kernel offers, and what the descriptor can do."""
    arg = uapi.uffdio_api(uapi.UFFD_API, features, 0)
    result = ioctl(fd, uapi.UFFDIO_API, byref(arg))
    if result == -errno.EPERM:
        raise Unavailable("userfaultfd", "UFFD_FEATURE_EVENT_FORK", "it takes CAP_SYS_PTRACE")
    if result < 0:
        raise Unavailable(
            "userfaultfd", f"UFFDIO_API: {os.strerror(-result)}", "use a newer kernel"
        )
    return Feature(arg.features), Ioctl(arg.ioctls)
