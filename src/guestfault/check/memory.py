"""What the software KVM and the pager ask of the host's memory management.

Three calls stand in for what KVM does inside the kernel: ``MADV_POPULATE_READ`` and ``_WRITE``
are its ``get_user_pages``, ``/proc/self/pagemap`` tells what is mapped in already, and a read or
write of a memfd is its ``copy_from_user`` and ``copy_to_user``.  Each is tried once here, on a
page of our own.
"""

from __future__ import annotations

from mmap import PAGESIZE

from guestfault.check.finding import Finding, Status, Use
from guestfault.errors import GuestfaultError
from guestfault.linux import process_memory
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.linux.pagemap import Pagemap

__all__ = ["probe"]

NEEDED_FOR = (Use.SOFTWARE_KVM, Use.DEMAND_PAGING)


def probe(pagemap_pid: int | str = "self") -> tuple[Finding, ...]:
    """Try a memfd, MADV_POPULATE, the pagemap of ``pagemap_pid``, and copies by the kernel."""
    try:
        memfd = Memfd("guestfault-check", PAGESIZE)
    except GuestfaultError as error:
        mend = "allow memfd_create (Linux 3.17) in this container's seccomp profile"
        return (Finding("memfd", Status.MISSING, str(error), mend, NEEDED_FOR),)
    with memfd, Mapping.from_memfd(memfd) as page:
        return (
            _ok("memfd", "guest RAM that is mapped twice"),
            _populate(page),
            _pagemap(page, pagemap_pid),
            _copies(page),
        )


def _populate(page: Mapping) -> Finding:
    name = "MADV_POPULATE"
    try:
        result = page.populate_write(0, PAGESIZE) or page.populate_read(0, PAGESIZE)
    except GuestfaultError as error:
        return Finding(name, Status.MISSING, str(error), "Linux 5.14 or newer", NEEDED_FOR)
    if result:
        mend = "allow madvise in this container's seccomp profile"
        return Finding(name, Status.MISSING, f"errno {-result}", mend, NEEDED_FOR)
    return _ok(name, "faults pages in as KVM would")


def _pagemap(page: Mapping, pid: int | str) -> Finding:
    name = "pagemap"
    try:
        with Pagemap(pid) as pagemap:
            pagemap.present(page.address)
    except GuestfaultError as error:
        mend = "mount /proc, with a kernel that has CONFIG_PROC_PAGE_MONITOR"
        return Finding(name, Status.MISSING, str(error), mend, NEEDED_FOR)
    return _ok(name, "readable: tells which pages are mapped in")


def _copies(page: Mapping) -> Finding:
    name = "kernel copies"
    try:
        copied = process_memory.write(page.address, b"guestfault")
        copied = copied and process_memory.read(page.address, 10) == b"guestfault"
        detail = "a copy of our own memory failed"
    except GuestfaultError as error:
        copied, detail = False, str(error)
    if copied:
        return _ok(name, "reach pages as KVM's own accesses do")
    mend = "allow pread and pwrite in this container's seccomp profile"
    return Finding(name, Status.MISSING, detail, mend, (Use.SOFTWARE_KVM,))


def _ok(name: str, detail: str) -> Finding:
    return Finding(name, Status.OK, detail, needed_for=NEEDED_FOR)
