"""Which pages are in a process's page tables: ``/proc/PID/pagemap``.

The file holds one 64-bit entry per virtual page (``fs/proc/task_mmu.c``,
``Documentation/admin-guide/mm/pagemap.rst``).  Reading it walks the page tables and nothing else:
it faults nothing in, wakes no userfaultfd, and needs no privilege for one's own process.  So it
answers, without side effects, the question that fast GUP asks in the kernel: is there a page *now*?

Three things it does not say.  A page with ``PROT_NONE`` is present: the entry is there, access is
not.  A file page that is in the page cache but not mapped here is not present.  And the answer is
of the moment: hold off what could change it, or be ready for the change.

The page frame number in the low bits is zero for readers without ``CAP_SYS_ADMIN`` in the initial
user namespace; nothing here uses it, but that a swap entry in its place can be a marker, or name a
broken page (:attr:`PageState.poisoned`).
"""

from __future__ import annotations

import os
from array import array
from dataclasses import dataclass, replace
from mmap import PAGESIZE
from typing import Self

from guestfault.closing import Closing
from guestfault.errors import Unavailable
from guestfault.uapi import mman as uapi

__all__ = ["PageState", "Pagemap"]

# A marker instead of a page is written as a swap entry: of the last swap type, the marker's bits in
# its offset (include/linux/swapops.h).  Swap entries are shown as type | offset << 5.
_MARKER = uapi.PM_SWAP | 31
_MARKER_MASK = uapi.PM_PRESENT | uapi.PM_SWAP | 31
_MARKER_POISONED = 1 << 1 << 5

# Broken memory has a swap type too; which, the kernel's configuration decides.  Pages on the move
# have others from the same range, so the page itself is looked at, by its number.
_NAMES_A_PAGE = range(22, 31)
_KPAGEFLAGS = "/proc/kpageflags"

_PRESENT_IN_LAST_BYTE = uapi.PM_PRESENT >> 56


@dataclass(frozen=True, slots=True)
class PageState:
    """One entry, decoded.

    ``present``: mapped, whatever its protection.  ``swapped``: in swap, or under migration.
    ``file``: a page of a file (a memfd's too) or shared anonymous.  ``soft_dirty``: written since
    the last ``/proc/PID/clear_refs`` (always set where the kernel has no soft-dirty tracking,
    meaningless then).  ``uffd_wp``: write-protected by userfaultfd.

    ``poisoned``: an access fails, because memory is broken, or as if it were: ``UFFDIO_POISON``, or
    a page that could not be read back from swap.  Only a reader with ``CAP_SYS_ADMIN`` can see it,
    and :meth:`Pagemap.state` alone can see broken memory.  ``guard``: a guard region
    (``MADV_GUARD_INSTALL``, told since Linux 6.15).  Both count as ``swapped``.
    """

    present: bool
    swapped: bool
    file: bool
    soft_dirty: bool
    uffd_wp: bool
    poisoned: bool = False
    guard: bool = False

    @classmethod
    def of(cls, entry: int) -> Self:
        """Decode a 64-bit entry."""
        return cls(
            present=bool(entry & uapi.PM_PRESENT),
            swapped=bool(entry & uapi.PM_SWAP),
            file=bool(entry & uapi.PM_FILE),
            soft_dirty=bool(entry & uapi.PM_SOFT_DIRTY),
            uffd_wp=bool(entry & uapi.PM_UFFD_WP),
            poisoned=entry & _MARKER_MASK == _MARKER and bool(entry & _MARKER_POISONED),
            guard=bool(entry & uapi.PM_GUARD_REGION),
        )


class Pagemap(Closing):
    """An open ``/proc/PID/pagemap``.  Any thread may use it.  Addresses need no alignment.

    ``pid`` is a process id or ``"self"``; the descriptor stays with the address space that the
    process had when it was opened, which matters after ``fork`` and ``execve``.
    Past the end of the address space nothing is mapped, so every entry is 0.

    Raises :class:`~guestfault.errors.Unavailable` where it cannot be opened.
    """

    def __init__(self, pid: int | str = "self") -> None:
        self.path = f"/proc/{pid}/pagemap"
        try:
            self.fd = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as e:
            mend = "mount /proc; for another process, one needs the right to ptrace it"
            raise Unavailable(self.path, os.strerror(e.errno or 0), mend) from None

    def present(self, address: int) -> bool:
        """Whether the page at ``address`` is mapped in.  About 0.7 us."""
        entry = os.pread(self.fd, 8, address // PAGESIZE * 8)
        return len(entry) == 8 and entry[7] & _PRESENT_IN_LAST_BYTE != 0

    def entry(self, address: int) -> int:
        """The 64-bit entry of the page at ``address``; 0 where nothing is mapped."""
        return int.from_bytes(os.pread(self.fd, 8, address // PAGESIZE * 8), "little")

    def entries(self, address: int, npages: int) -> array[int]:
        """The entries of ``npages`` pages from ``address`` on, as unsigned 64-bit integers."""
        start, size = address // PAGESIZE * 8, 8 * npages
        raw = bytearray()
        while len(raw) < size and (chunk := os.pread(self.fd, size - len(raw), start + len(raw))):
            raw += chunk
        return array("Q", raw.ljust(size, b"\0"))

    def state(self, address: int) -> PageState:
        """The entry of the page at ``address``, decoded."""
        entry = self.entry(address)
        state = PageState.of(entry)
        return replace(state, poisoned=True) if _is_broken(entry) else state

    def close(self) -> None:
        """Close the descriptor.  May be called again."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


def _is_broken(entry: int) -> bool:
    """Whether a swap entry stands for a page that the kernel has given up as broken."""
    swapped = entry & (uapi.PM_PRESENT | uapi.PM_SWAP) == uapi.PM_SWAP
    if not swapped or entry & 31 not in _NAMES_A_PAGE:
        return False
    number = (entry & uapi.PM_PFRAME_MASK) >> 5
    try:
        with open(_KPAGEFLAGS, "rb", buffering=0) as file:
            flags = os.pread(file.fileno(), 8, number * 8)
    except OSError:
        return False  # no right to look, or no such file
    return bool(int.from_bytes(flags, "little") >> uapi.KPF_HWPOISON & 1)
