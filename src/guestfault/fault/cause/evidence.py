"""What there is to see of an access that failed, without changing any of it.

Live, everything comes from ``/proc`` and ``/sys`` (:func:`gather`).  A report of another machine
can be judged as well: parse the text that it has (:func:`guestfault.linux.vma.parse` for ``smaps``)
and put the :class:`Evidence` together by hand.

It is of the moment.  Between the failure and the look another thread can have resolved the page:
then the evidence says *present*, and a retry is the right thing.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from guestfault.fault.access import Access, AccessKind
from guestfault.fault.outcome import BareFault, MemoryFault, Poisoned, RamMmio
from guestfault.linux import vma as vma_module
from guestfault.linux.cgroup import Limit, hugetlb_limits, memory_limits
from guestfault.linux.hugetlb import POOLS, Pool, pools
from guestfault.linux.mapped_file import MappedFile, in_page_cache, mapped_file
from guestfault.linux.pagemap import Pagemap, PageState
from guestfault.linux.vma import Vma
from guestfault.memory.slots import MemorySlot
from guestfault.uapi import kvm as uapi

__all__ = ["ABSENT", "Evidence", "Failure", "gather"]

ABSENT = PageState(present=False, swapped=False, file=False, soft_dirty=False, uffd_wp=False)
"""The page table entry of a page that is not mapped in."""

Failure = MemoryFault | BareFault | Poisoned | RamMmio
"""The outcomes of KVM_RUN that a failed access to guest memory can have."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """Everything that the judgement rests on; what is ``None`` is not known.

    ``gpa``, ``hva`` and ``slot`` say where, in bytes; ``kind`` what the access does.  ``failure``
    is the outcome that it had, ``attributes`` are the ``KVM_MEMORY_ATTRIBUTE_*`` of the page.

    ``vma`` is the mapping at ``hva``, ``None`` if there *is* none; its ``flags`` may be unknown.
    ``page`` is the page table entry, ``has_page`` whether the file behind holds something there,
    ``file`` the rest of what is known about the file.  ``pool`` and ``hugetlb_limits`` are those of
    the mapping's huge page size, ``memory_limits`` the process's.
    """

    gpa: int | None = None
    hva: int | None = None
    kind: AccessKind | None = None
    slot: MemorySlot | None = None
    failure: Failure | None = None
    attributes: int | None = None
    vma: Vma | None = None
    page: PageState = ABSENT
    has_page: bool | None = None
    file: MappedFile | None = None
    pool: Pool | None = None
    hugetlb_limits: tuple[Limit, ...] = ()
    memory_limits: tuple[Limit, ...] = ()

    @property
    def flags(self) -> frozenset[str]:
        """The mapping's ``VmFlags``; empty if they are not known."""
        return (self.vma and self.vma.flags) or frozenset()

    @property
    def poisoned(self) -> bool:
        """Whether KVM sent SIGBUS for this very page: of an access over two, one may be sound."""
        failure, hva = self.failure, self.hva
        return (
            isinstance(failure, Poisoned)
            and hva is not None
            and failure.hva >> failure.lsb == hva >> failure.lsb
        )

    @property
    def is_private(self) -> bool:
        """Whether KVM said that the access was to *private* memory.

        Bit 3 in every interface that has the flag.
        """
        failure = self.failure
        return isinstance(failure, MemoryFault) and bool(
            failure.flags & uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE
        )


def gather(
    access: Access,
    failure: Failure | None = None,
    *,
    attributes: int | None = None,
    pid: int | str = "self",
) -> tuple[Evidence, ...]:
    """Look at the page that an access is to, or at both if it crosses into the next.

    ``pid`` is the VMM's.  Raises :class:`~guestfault.errors.KernelError` or
    :class:`~guestfault.errors.Unavailable` if ``/proc/PID`` may not be read.
    """
    gpa, hva, slot = access.gpa, access.hva, access.slot
    if hva is None and gpa is not None and slot is not None:
        hva = slot.hva_of(gpa)
    known = Evidence(gpa, hva, access.kind, slot, failure, attributes)
    if hva is None:
        return (known,)
    last = hva + max(access.size, 1) - 1
    next_page = (hva & -_PAGE_SIZE) + _PAGE_SIZE
    hvas = [hva] if last < next_page else [hva, next_page]
    mappings = vma_module.vmas(pid, flags=True)
    with Pagemap(pid) as pagemap:
        return tuple(
            _look(known, address, address - hva, mappings, pagemap, pid) for address in hvas
        )


_PAGE_SIZE = 4096


def _look(
    known: Evidence,
    hva: int,
    shift: int,
    mappings: list[Vma],
    pagemap: Pagemap,
    pid: int | str,
) -> Evidence:
    vma = next((vma for vma in mappings if hva in vma), None)
    gpa = None if known.gpa is None else known.gpa + shift
    if vma is None:
        return Evidence(gpa, hva, known.kind, known.slot, known.failure, known.attributes)
    file = mapped_file(vma, hva, pid)
    cgroup = f"/proc/{pid}/cgroup"
    is_huge = "ht" in (vma.flags or ())
    return Evidence(
        gpa,
        hva,
        known.kind,
        known.slot,
        known.failure,
        known.attributes,
        vma,
        pagemap.state(hva),
        _has_page(vma, hva, file, pid),
        file,
        _pool(vma.page_size) if is_huge else None,
        hugetlb_limits(vma.page_size, cgroup) if is_huge and vma.page_size else (),
        memory_limits(cgroup),
    )


def _has_page(vma: Vma, hva: int, file: MappedFile | None, pid: int | str) -> bool | None:
    if not vma.inode:
        return False
    if file is not None:
        return file.has_page
    # Of a mapping that could be made shared and writable, mincore() tells us the truth.
    if vma.shared and vma.write and "ht" not in (vma.flags or ()) and _is_self(pid):
        return in_page_cache(hva)
    return None


def _is_self(pid: int | str) -> bool:
    return pid == "self" or Path("/proc", str(pid)).resolve() == Path("/proc/self").resolve()


def _pool(page_size: int | None) -> Pool | None:
    return next((pool for pool in pools(POOLS) if pool.page_size == page_size), None)
