"""Why a page that is not mapped in could not be faulted in.

The kernel's order (``mm/shmem.c`` ``shmem_get_folio_gfp``, ``mm/hugetlb.c`` ``hugetlb_no_page``,
``mm/userfaultfd.c``): the file's size; then userfaultfd, *minor* for a page that the file holds and
*missing* for one that it does not; and only then, for a page that must be allocated, the file
system's limit, the control group's, and the pool or memory that it comes from.

Full is not a matter of degree here: a file system, a pool or a group is to blame only if one more
page does not fit.  Control groups are charged in batches of 64 pages per CPU and drained when the
limit is met, so a group that is short by less than a batch is named too, but not as certain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from mmap import PAGESIZE

from guestfault.fault.cause.evidence import Evidence
from guestfault.fault.cause.record import Cause, Kind, Remedy
from guestfault.fault.outcome import MemoryFault
from guestfault.linux.cgroup import Limit
from guestfault.linux.units import bytes_text
from guestfault.linux.vma import Vma

__all__ = ["judge_absent"]

_CHARGE_BATCH = 64 * PAGESIZE  # MEMCG_CHARGE_BATCH


def judge_absent(evidence: Evidence, vma: Vma) -> tuple[Cause, ...]:
    """The causes for an access that the mapping allows to a page that is not mapped in."""
    assert evidence.hva is not None
    page_size = vma.page_size or PAGESIZE
    offset = vma.offset_of(evidence.hva) & -page_size
    file = evidence.file
    if file is not None and offset >= file.size:
        return (
            Cause(
                Kind.PAST_END_OF_FILE,
                f"{vma.path or 'the file'} has {file.size:#x} bytes, and the mapping "
                f"{vma.start:#x}-{vma.end:#x} reads offset {offset:#x} of it at {evidence.hva:#x}",
                Remedy.GROW_FILE,
                f"grow the file to {offset + page_size:#x} bytes or more",
            ),
        )
    by_userfaultfd = _userfaultfd(evidence, vma)
    if by_userfaultfd:
        return by_userfaultfd
    # A page that the file holds costs nothing more, unless it is copied on write.
    needs_page = evidence.has_page is not True or not vma.shared
    exhausted = tuple(_exhausted(evidence, vma, page_size)) if needs_page else ()
    if exhausted:
        if evidence.has_page is None and vma.inode and vma.shared:
            exhausted = tuple(replace(cause, certain=False) for cause in exhausted)
        return exhausted
    return (
        Cause(
            Kind.NOT_MAPPED_IN,
            f"the page at {evidence.hva:#x} is not mapped in, and nothing is seen that would keep "
            "the kernel from faulting it in",
            Remedy.POPULATE,
            "fill the page from its source first, if it has one: a page of a hole reads as zeros",
            # A KVM whose slots exit on every page that is out says so; a bare error is a riddle.
            certain=isinstance(evidence.failure, MemoryFault),
        ),
    )


def _userfaultfd(evidence: Evidence, vma: Vma) -> tuple[Cause, ...]:
    """What userfaultfd would be asked to resolve; nothing if it would not be asked."""
    at = f"the page at {evidence.hva:#x} in {vma.start:#x}-{vma.end:#x}"
    missing = Cause(
        Kind.UFFD_MISSING,
        f"{at} is registered with userfaultfd for missing pages, and its page does not exist yet",
        Remedy.COPY,
        "copy the page in; or write it to the file through another mapping, then UFFDIO_CONTINUE",
    )
    minor = Cause(
        Kind.UFFD_MINOR,
        f"{at} is registered with userfaultfd for minor faults, and the page cache has its page",
        Remedy.CONTINUE,
        "see that the content is right, then map it",
    )
    for_missing, for_minor = "um" in evidence.flags, "ui" in evidence.flags
    match evidence.has_page:
        case True:
            return (minor,) if for_minor else ()
        case False:
            return (missing,) if for_missing else ()
        case None:
            known = [c for c, on in ((missing, for_missing), (minor, for_minor)) if on]
            return tuple(replace(cause, certain=False) for cause in known)


def _exhausted(evidence: Evidence, vma: Vma, page_size: int) -> Iterator[Cause]:
    """What one more page would run out of, in the order in which the kernel asks for it."""
    file = evidence.file
    if file is not None and file.capacity and file.free < page_size:
        yield Cause(
            Kind.FILE_SYSTEM_FULL,
            f"the file system of {vma.path} is full: {bytes_text(file.free)} of "
            f"{bytes_text(file.capacity)} free, a page of {bytes_text(page_size)} needed",
            Remedy.FREE_SPACE,
            "delete files there, or make it larger (mount -o remount,size=SIZE)",
        )
    if "ht" in evidence.flags:
        yield from _hugetlb(evidence, vma, page_size)
    yield from _at_limit(
        evidence.memory_limits,
        page_size,
        page_size + _CHARGE_BATCH,
        Cause(Kind.MEMORY_CGROUP_LIMIT, "memory cgroup", Remedy.RAISE_MEMORY_LIMIT),
    )


def _hugetlb(evidence: Evidence, vma: Vma, page_size: int) -> Iterator[Cause]:
    yield from _at_limit(
        evidence.hugetlb_limits,
        page_size,
        page_size,
        Cause(Kind.HUGETLB_CGROUP_LIMIT, "hugetlb cgroup", Remedy.RAISE_HUGETLB_LIMIT),
    )
    pool = evidence.pool
    reserved = "nr" not in evidence.flags
    if pool is not None and not pool.available(with_reservation=reserved):
        yield Cause(
            Kind.HUGETLB_POOL_EMPTY,
            f"the pool of {bytes_text(page_size)} pages has none left for "
            f"{vma.start:#x}-{vma.end:#x}: {pool.free} of {pool.total} are free and "
            f"{pool.reserved} reserved, {pool.surplus} of {pool.overcommit} more were borrowed",
            Remedy.ADD_HUGE_PAGES,
            "raise nr_hugepages or nr_overcommit_hugepages in "
            f"/sys/kernel/mm/hugepages/hugepages-{page_size >> 10}kB",
        )


def _at_limit(
    limits: tuple[Limit, ...], page_size: int, margin: int, cause: Cause
) -> Iterator[Cause]:
    """The tightest of ``limits``, if one more page would break it or might."""
    tightest = min(limits, key=lambda limit: limit.room, default=None)
    if tightest is not None and tightest.room < margin:
        yield replace(
            cause,
            what=f"the {cause.what} is at its limit: {bytes_text(tightest.usage)} of "
            f"{bytes_text(tightest.limit)} used ({tightest.file.parent})",
            how=f"raise {tightest.file}, or free memory in the group",
            certain=tightest.room < page_size,
        )
