"""Memory that guests can be backed with: ``/dev/shm``, huge pages in shmem, and hugetlb pools.

guestfault's own guests live in memfds, which have no size limit besides the control group's.  A
VMM that keeps guest RAM in a file of ``/dev/shm`` is limited by that mount: past it a page fault
fails with SIGBUS in the VMM and with a bare -EFAULT in KVM_RUN.  The same happens past the end of
a hugetlb pool, unless the pages were reserved by ``mmap``.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from guestfault.check.finding import Finding, Status, Use
from guestfault.linux.hugetlb import pools
from guestfault.linux.units import bytes_text

__all__ = ["probe"]

# What a container gets that asked for nothing, and too little for a guest of any size.
CONTAINER_DEFAULT = 64 << 20

MM = "/sys/kernel/mm"


def probe(shm: str = "/dev/shm", mm: str = MM) -> tuple[Finding, ...]:
    """Look at the shm mount, the shmem huge page setting, and the hugetlb pools."""
    return (
        _shm(shm),
        _shmem_enabled(Path(mm, "transparent_hugepage/shmem_enabled")),
        _hugetlb(Path(mm, "hugepages")),
    )


def _shm(path: str) -> Finding:
    needed_for = (Use.SHARED_FILES,)
    try:
        fs = os.statvfs(path)
    except OSError as error:
        mend = f"mount -t tmpfs tmpfs {path} (as root)"
        return Finding(path, Status.MISSING, error.strerror or "", mend, needed_for)
    size, free = fs.f_blocks * fs.f_frsize, fs.f_bavail * fs.f_frsize
    detail = f"{bytes_text(free)} free of {bytes_text(size)}"
    if free > CONTAINER_DEFAULT:
        return Finding(path, Status.OK, detail, needed_for=needed_for)
    mend = f"mount -o remount,size=SIZE {path} (as root), or start the container with --shm-size"
    return Finding(path, Status.LIMITED, detail, mend, needed_for)


def _shmem_enabled(path: Path) -> Finding:
    name, needed_for = "shmem_enabled", (Use.HUGE_PAGES,)
    try:
        setting = re.search(r"\[(\w+)\]", path.read_text())
    except OSError:
        setting = None
    if setting is None:
        mend = "a kernel with CONFIG_TRANSPARENT_HUGEPAGE"
        return Finding(name, Status.MISSING, f"no setting in {path}", mend, needed_for)
    if setting[1] in ("never", "deny"):
        mend = f"echo advise > {path} (as root)"
        detail = f"{setting[1]}: memfd pages are 4 KiB each"
        return Finding(name, Status.LIMITED, detail, mend, needed_for)
    if setting[1] == "force":
        # It overrides MADV_NOHUGEPAGE, by which guest RAM keeps huge pages out.
        mend = f"echo advise > {path} (as root)"
        detail = "force: one page filled would make 511 neighbours present, as zeros"
        return Finding(name, Status.LIMITED, detail, mend, (*needed_for, Use.SOFTWARE_KVM))
    return Finding(name, Status.OK, setting[1], needed_for=needed_for)


def _hugetlb(directory: Path) -> Finding:
    name, needed_for = "hugetlb pools", (Use.HUGE_PAGES,)
    found = pools(directory)
    if not found:
        mend = "a kernel with CONFIG_HUGETLBFS"
        return Finding(name, Status.MISSING, f"no pools in {directory}", mend, needed_for)
    detail = "; ".join(
        f"{bytes_text(pool.page_size)}: "
        + (f"{pool.free} of {pool.total} free" if pool.total else "empty")
        for pool in found
    )
    if any(pool.free for pool in found):
        return Finding(name, Status.OK, detail, needed_for=needed_for)
    mend = "sysctl vm.nr_hugepages=COUNT (as root)"
    return Finding(name, Status.LIMITED, detail, mend, needed_for)
