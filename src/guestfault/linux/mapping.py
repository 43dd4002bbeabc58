"""Ranges of our own address space: ``mmap(2)`` with the address known, and what becomes of pages.

Python's :class:`mmap.mmap` hides the address, which a memory slot, a userfaultfd and ``/proc`` all
speak in, and it indexes the memory while holding the GIL.  A :class:`Mapping` owns a range and
hands out its address instead.

Guest memory is one :class:`~guestfault.linux.memfd.Memfd` mapped twice.  The *guest* view goes to
KVM and is registered with userfaultfd; the *host* view never is, and is the only one of which
:meth:`Mapping.view` may be asked.  Python touches a memoryview with the GIL held: on a registered
page that has no content the kernel puts the thread to sleep until the page is filled, and the
thread that would fill it waits for the GIL.  Nothing in Python can resolve that.

``populate_read`` and ``populate_write`` are how a program asks for the kernel's own
``get_user_pages``: they fault pages in as an access would, sleep in userfaultfd as one would, and
fail with its errno instead of a signal (``mm/gup.c``, ``faultin_page_range``; Linux 5.14).
"""

from __future__ import annotations

import ctypes
import errno
import functools
import weakref
from mmap import PAGESIZE
from typing import Self

from guestfault.closing import Closing
from guestfault.errors import Unavailable
from guestfault.linux.ioctl import call, check, libc
from guestfault.linux.memfd import Memfd
from guestfault.linux.mmu_notifier import invalidating
from guestfault.uapi import mman as uapi

__all__ = ["Mapping", "populate_read", "populate_write"]

PROT_RW = uapi.PROT_READ | uapi.PROT_WRITE

_mmap = libc.mmap
_mmap.argtypes = [
    ctypes.c_void_p,
    ctypes.c_size_t,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int,
    ctypes.c_int64,
]
_mmap.restype = ctypes.c_ssize_t  # user addresses are positive, MAP_FAILED is -1

_munmap = libc.munmap
_munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]

_mprotect = libc.mprotect
_mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_madvise = libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def populate_read(address: int, size: int) -> int:
    """Fault pages in for reading (``MADV_POPULATE_READ``); 0 or a negative errno.

    ``address`` and ``size`` are multiples of the page size.  May sleep in userfaultfd, without the
    GIL.  The first page that cannot be had ends it, and the pages before it stay:

    - EFAULT: an access would be a SIGBUS: past the end of the file, or a registered page that
      nobody may wait for (``UFFD_FEATURE_SIGBUS``);
    - EINVAL: the protection forbids the access, or the range is a special mapping (``VM_PFNMAP``);
    - ENOMEM: part of the range is not mapped, or there is no memory;
    - EHWPOISON: the page is poisoned, by hardware or ``UFFDIO_POISON``.

    Only a fatal signal ends the sleep.

    Raises :class:`~guestfault.errors.Unavailable` on a kernel older than 5.14.
    """
    return _populate(address, size, uapi.MADV_POPULATE_READ)


def populate_write(address: int, size: int) -> int:
    """Fault pages in for writing (``MADV_POPULATE_WRITE``); otherwise as :func:`populate_read`.

    Writable page table entries result, copies of pages shared copy-on-write included; the content
    does not change.
    """
    return _populate(address, size, uapi.MADV_POPULATE_WRITE)


def _populate(address: int, size: int, advice: int) -> int:
    result = call(_madvise, address, size, advice)
    if result == -errno.EINVAL and not _kernel_can_populate():
        raise Unavailable(
            "madvise(MADV_POPULATE_READ)", "this kernel does not know it", "use Linux 5.14 or later"
        )
    return result


@functools.cache
def _kernel_can_populate() -> bool:
    """Tell an EINVAL for unknown advice from one for the protection: try where all is allowed."""
    with Mapping.anonymous(PAGESIZE) as page:
        return call(_madvise, page.address, page.size, uapi.MADV_POPULATE_READ) == 0


class Mapping(Closing):
    """A mapped range that we own: ``size`` bytes at ``address``, unmapped by :meth:`close` only.

    Made by :meth:`from_memfd` and :meth:`anonymous`.  Offsets are in bytes from its start.  Offsets
    and sizes must be multiples of the page size; a range that is not inside is a
    :class:`ValueError`, for the kernel would act on whatever lies there.

    Nothing reserves memory or swap (``MAP_NORESERVE``): a guest's memory is larger than what it
    uses.  Where the pages run out is therefore found out at the access that needs one.

    >>> ram = Memfd("guest-ram", 1 << 20)
    >>> host, guest = Mapping.from_memfd(ram), Mapping.from_memfd(ram)
    >>> host.view()[0] = 7
    >>> guest.view()[0]
    7
    """

    def __init__(
        self,
        size: int,
        prot: int,
        flags: int,
        memfd: Memfd | None = None,
        offset: int = 0,
    ) -> None:
        fd = -1 if memfd is None else memfd.fd
        flags |= uapi.MAP_NORESERVE
        result = call(_mmap, None, size, prot, flags, fd, offset)
        of = "anonymous" if memfd is None else memfd.name
        self.address = check(result, "mmap", f"{of}, {offset:#x}+{size:#x}, prot {prot:#x}")
        self.size = size
        self.offset = offset
        self.memfd = memfd
        self._view: memoryview | None = None
        self._exporter: weakref.ref[object] | None = None
        self._prot = prot
        self._flags = flags
        self._mapped = True
        if memfd is not None:
            memfd.mapped.append(self)

    @classmethod
    def from_memfd(
        cls,
        memfd: Memfd,
        *,
        offset: int = 0,
        size: int | None = None,
        prot: int = PROT_RW,
        shared: bool = True,
    ) -> Self:
        """Map ``size`` bytes of a file from ``offset`` on; by default all of it.

        ``shared=False`` maps it copy-on-write.  Raises :class:`~guestfault.errors.KernelError`:
        EINVAL for an unaligned offset or size 0, ENOMEM without address space, EPERM if sealed.
        """
        flags = uapi.MAP_SHARED if shared else uapi.MAP_PRIVATE
        return cls(memfd.size - offset if size is None else size, prot, flags, memfd, offset)

    @classmethod
    def anonymous(cls, size: int, *, prot: int = PROT_RW, shared: bool = False) -> Self:
        """Map ``size`` bytes of zeros, private or shared (with children of ``fork``).

        Raises :class:`~guestfault.errors.KernelError` as :meth:`from_memfd` does.
        """
        flags = uapi.MAP_SHARED if shared else uapi.MAP_PRIVATE
        return cls(size, prot, flags | uapi.MAP_ANONYMOUS)

    @property
    def end(self) -> int:
        """The address past the last byte."""
        return self.address + self.size

    def protect(self, offset: int, size: int, prot: int) -> None:
        """Set the protection of a part, a combination of ``PROT_*``.  ``mprotect(2)``.

        Raises :class:`~guestfault.errors.KernelError`: ENOMEM if the parts would be too many
        (``vm.max_map_count``), EACCES if the file forbids it.
        """
        at = self._at(offset, size)
        with invalidating(at, at + size):
            result = call(_mprotect, at, size, prot)
        check(result, "mprotect", f"{at:#x}+{size:#x}, prot {prot:#x}")

    def discard(self, offset: int, size: int) -> None:
        """Unmap pages (``MADV_DONTNEED``): the next access faults again.

        A private mapping loses what was written to it.  In a shared mapping of a file the content
        stays in the page cache, and a registered page is a minor fault from now on, not a missing
        one.

        Trap: on a range registered with ``UFFD_FEATURE_EVENT_REMOVE`` this sleeps until the event
        is read from the userfaultfd, and until then UFFDIO_COPY and its kin fail with EAGAIN.

        Raises :class:`~guestfault.errors.KernelError`, EINVAL for a locked range.
        """
        at = self._at(offset, size)
        with invalidating(at, at + size):
            result = call(_madvise, at, size, uapi.MADV_DONTNEED)
        check(result, "madvise(MADV_DONTNEED)", f"{at:#x}+{size:#x}")

    def unmap(self, offset: int, size: int) -> None:
        """Leave nothing mapped at a part, until :meth:`map_again`.  ``munmap(2)``.

        Trap: the kernel may put the next mapping that anybody makes there.  Keep the part smaller
        than any, and the time short.
        """
        at = self._at(offset, size)
        with invalidating(at, at + size):
            result = call(_munmap, at, size)
        check(result, "munmap", f"{at:#x}+{size:#x}")

    def map_again(self, offset: int, size: int) -> None:
        """Map a part as the whole was when it was made, whatever has become of it since.

        Raises :class:`~guestfault.errors.KernelError`, EEXIST if something else is mapped there by
        now: it is left alone.
        """
        at = self._at(offset, size)
        fd = -1 if self.memfd is None else self.memfd.fd
        flags = self._flags | uapi.MAP_FIXED_NOREPLACE
        result = call(_mmap, at, size, self._prot, flags, fd, self.offset + offset)
        check(result, "mmap", f"{at:#x}+{size:#x}, again")

    def hwpoison(self, offset: int, size: int) -> None:
        """Have the kernel take pages for broken memory (``MADV_HWPOISON``): they are lost for good.

        The *machine* loses them, until it boots again; other mappings of the file lose the content.
        For a machine that was made for it.  Raises :class:`~guestfault.errors.KernelError`: EPERM
        without CAP_SYS_ADMIN, EINVAL without CONFIG_MEMORY_FAILURE.
        """
        at = self._at(offset, size)
        with invalidating(at, at + size):
            result = call(_madvise, at, size, uapi.MADV_HWPOISON)
        check(result, "madvise(MADV_HWPOISON)", f"{at:#x}+{size:#x}")

    def populate_read(self, offset: int, size: int) -> int:
        """:func:`populate_read` of a part; 0 or a negative errno."""
        return populate_read(self._at(offset, size), size)

    def populate_write(self, offset: int, size: int) -> int:
        """:func:`populate_write` of a part; 0 or a negative errno."""
        return populate_write(self._at(offset, size), size)

    def no_hugepage(self) -> None:
        """Keep transparent huge pages out (``MADV_NOHUGEPAGE``).

        With huge pages of shmem one fill makes 511 neighbours present that no source has filled,
        and they read as zeros.  Call it on both views, before the first access.
        """
        result = call(_madvise, self.address, self.size, uapi.MADV_NOHUGEPAGE)
        # EINVAL: a kernel without huge pages, which has none to keep out.
        if result != -errno.EINVAL:
            check(result, "madvise(MADV_NOHUGEPAGE)", f"{self.address:#x}+{self.size:#x}")

    def view(self) -> memoryview:
        """The bytes, writable, for Python to index; one object, which only :meth:`close` releases.

        Never of a range registered with userfaultfd: it is indexed with the GIL held (see the
        module).  An access that ``prot`` forbids, or past the end of the file, is a fatal signal.
        """
        if self._view is None:
            self._at(0, self.size)
            exporter = (ctypes.c_ubyte * self.size).from_address(self.address)
            self._exporter = weakref.ref(exporter)
            self._view = memoryview(exporter).cast("B")
        return self._view

    def close(self) -> None:
        """Unmap it.  May be called again.

        Releases the view.  Raises :class:`BufferError`, and unmaps nothing, while a slice of it or
        another export (``numpy.frombuffer``) lives: the next access through that would be fatal.
        """
        if not self._mapped:
            return
        if self._view is not None:
            self._view.release()
            self._view = None
        if self._exporter is not None and self._exporter() is not None:
            raise BufferError(f"the mapping at {self.address:#x} is still in use through its view")
        with invalidating(self.address, self.end):
            result = call(_munmap, self.address, self.size)
        check(result, "munmap", f"{self.address:#x}+{self.size:#x}")
        self._mapped = False
        if self.memfd is not None:
            self.memfd.mapped.remove(self)

    def _at(self, offset: int, size: int) -> int:
        """The address of a part, if it is one."""
        if not self._mapped:
            raise ValueError("the mapping is closed")
        if offset < 0 or size < 0 or offset + size > self.size:
            raise ValueError(
                f"{offset:#x}+{size:#x} is not inside a mapping of {self.size:#x} bytes"
            )
        return self.address + offset
