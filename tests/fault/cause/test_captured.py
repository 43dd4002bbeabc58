"""CAPTURED: causes that cannot be made to happen here, judged from text that shows them.

No KVM runs in this file.  The mappings are lines of ``smaps``; the counters are those of the files.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from guestfault.dialect.interface import EHWPOISON
from guestfault.fault.access import AccessKind
from guestfault.fault.cause.evidence import ABSENT, Evidence
from guestfault.fault.cause.judge import judge
from guestfault.fault.cause.record import Kind, Remedy
from guestfault.fault.outcome import BareFault, MemoryFault, Poisoned
from guestfault.linux import vma
from guestfault.linux.cgroup import Limit
from guestfault.linux.hugetlb import Pool
from guestfault.linux.mapped_file import MappedFile
from guestfault.memory.slots import MemorySlot
from guestfault.uapi import kvm as uapi

PAGE = 4096
READ, WRITE = AccessKind.READ, AccessKind.WRITE
BARE = BareFault(14)
PRIVATE = uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE

# A dma-buf of a graphics driver, as muvm maps it; hugetlb; /dev/shm; guest RAM under userfaultfd.
DMA_BUF = """\
7f5a1c000000-7f5a1c200000 rw-s 10e2c5000 00:06 409                       /dev/dri/renderD128
KernelPageSize:        4 kB
VmFlags: rd wr sh mr mw me ms pf io de dd
"""
HUGETLB = """\
7f3d80000000-7f3dc0000000 rw-s 00000000 00:0f 20511                      /memfd:guest (deleted)
KernelPageSize:     2048 kB
VmFlags: rd wr sh mr mw me ms nr de ht
"""
SHM = """\
7f1000000000-7f1e00000000 rw-s 00000000 00:18 17                         /dev/shm/qemu-ram
KernelPageSize:        4 kB
VmFlags: rd wr sh mr mw me ms nr sd
"""
UFFD = """\
7f1e40000000-7f1e60000000 rw-s 00000000 00:01 2051                       /memfd:ram (deleted)
KernelPageSize:        4 kB
VmFlags: rd wr sh mr mw me ms um ui uw nh
"""


def evidence(text: str, **more: object) -> Evidence:
    (mapping,) = vma.parse(text)
    known = Evidence(hva=mapping.start + 0x3008, kind=WRITE, failure=BARE, vma=mapping)
    return replace(known, **more)  # type: ignore[arg-type]


def test_device_memory_without_a_writable_entry() -> None:
    (cause,) = judge(evidence(DMA_BUF))
    assert (cause.kind, cause.by, cause.certain) == (Kind.DEVICE_MAPPING, Remedy.NONE, True)
    assert "0x7f5a1c000000-0x7f5a1c200000 of /dev/dri/renderD128" in cause.what


def test_hugetlb_cgroup_at_its_limit() -> None:
    limit = Limit(1 << 30, 1 << 30, Path("/sys/fs/cgroup/pod/hugetlb.2MB.max"))
    pool = Pool(2 << 20, total=1024, free=300, reserved=0, overcommit=0, surplus=0)
    (cause,) = judge(evidence(HUGETLB, pool=pool, hugetlb_limits=(limit,), has_page=False))
    assert (cause.kind, cause.by) == (Kind.HUGETLB_CGROUP_LIMIT, Remedy.RAISE_HUGETLB_LIMIT)
    assert "1 GiB of 1 GiB used (/sys/fs/cgroup/pod)" in cause.what
    assert "hugetlb.2MB.max" in cause.how


def test_what_would_be_met_next_is_told_too_in_the_kernels_order() -> None:
    limit = Limit(0, 0, Path("/sys/fs/cgroup/pod/hugetlb.2MB.max"))
    pool = Pool(2 << 20, total=4, free=2, reserved=2, overcommit=0, surplus=0)
    found = judge(evidence(HUGETLB, pool=pool, hugetlb_limits=(limit,), has_page=False))
    assert [c.kind for c in found] == [Kind.HUGETLB_CGROUP_LIMIT, Kind.HUGETLB_POOL_EMPTY]
    assert "2 of 4 are free and 2 reserved" in found[1].what


def test_a_mapping_with_a_reservation_may_have_the_reserved_page() -> None:
    pool = Pool(2 << 20, total=4, free=2, reserved=2, overcommit=0, surplus=0)
    (cause,) = judge(evidence(HUGETLB.replace(" nr", ""), pool=pool, has_page=False))
    assert cause.kind is Kind.NOT_MAPPED_IN


def test_a_hugetlb_file_half_full_leaves_missing_and_minor_open() -> None:
    found = judge(evidence(HUGETLB.replace(" nr", " um ui"), has_page=None))
    assert [(c.kind, c.certain) for c in found] == [
        (Kind.UFFD_MISSING, False),
        (Kind.UFFD_MINOR, False),
    ]


def test_shm_full() -> None:
    shm = MappedFile(56 << 30, capacity=32 << 30, free=0, has_page=False)
    (cause,) = judge(evidence(SHM, file=shm, has_page=False))
    assert cause.kind is Kind.FILE_SYSTEM_FULL
    assert "/dev/shm/qemu-ram is full: 0 bytes of 32 GiB free" in cause.what


@pytest.mark.parametrize("has_page", [True, False])
def test_a_full_file_system_is_no_matter_for_a_page_that_is_there(has_page: bool) -> None:
    shm = MappedFile(56 << 30, capacity=32 << 30, free=0, has_page=has_page)
    kind = judge(evidence(SHM, file=shm, has_page=has_page))[0].kind
    assert (kind is Kind.FILE_SYSTEM_FULL) is not has_page


@pytest.mark.parametrize(("room", "certain"), [(0, True), (PAGE, False), (65 * PAGE, None)])
def test_memory_cgroup_version_2(room: int, certain: bool | None) -> None:
    limit = Limit(1 << 30, (1 << 30) - room, Path("/sys/fs/cgroup/vm.slice/memory.max"))
    (cause,) = judge(evidence(SHM, memory_limits=(limit,), has_page=False))
    if certain is None:
        assert cause.kind is Kind.NOT_MAPPED_IN
    else:
        assert (cause.kind, cause.certain) == (Kind.MEMORY_CGROUP_LIMIT, certain)


def gmem(failure: MemoryFault, **more: object) -> Evidence:
    slot = MemorySlot(0, 1 << 30, 0x7F1000000000, 4, uapi.KVM_MEM_GUEST_MEMFD)
    known = evidence(SHM, gpa=0x1000, slot=slot, failure=failure)
    return replace(known, **more)  # type: ignore[arg-type]


def test_private_access_to_a_slot_that_cannot_be_private() -> None:
    """libkrun's `MemoryFault { flags: 8, gpa: 4096 }`, "unexpected exit"."""
    fault = MemoryFault(0x1000, PAGE, PRIVATE, 14)
    plain = MemorySlot(0, 1 << 30, 0x7F1000000000, 4)
    (cause,) = judge(gmem(fault, slot=plain))
    assert (cause.kind, cause.by) == (Kind.NO_GUEST_MEMFD, Remedy.ADD_GUEST_MEMFD)


@pytest.mark.parametrize(
    ("flags", "attributes", "kind"),
    [
        (PRIVATE, 0, Kind.PRIVATE_MISMATCH),
        (0, uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE, Kind.PRIVATE_MISMATCH),
        (PRIVATE, uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE, Kind.GUEST_MEMFD_GONE),
        (0, 0, Kind.GUEST_MEMFD_GONE),
    ],
)
def test_private_and_shared(flags: int, attributes: int, kind: Kind) -> None:
    (cause,) = judge(gmem(MemoryFault(0x1000, PAGE, flags, 14), attributes=attributes))
    assert (cause.kind, cause.certain) == (kind, True)
    if kind is Kind.PRIVATE_MISMATCH:
        asked, other = ("private", "shared") if flags else ("shared", "private")
        assert f"as {asked} memory, and its attributes say {other}" in cause.what


def test_without_the_attributes_both_are_told_and_neither_is_certain() -> None:
    found = judge(gmem(MemoryFault(0x1000, PAGE, PRIVATE, 14)))
    assert [(c.kind, c.certain) for c in found] == [
        (Kind.PRIVATE_MISMATCH, False),
        (Kind.GUEST_MEMFD_GONE, False),
    ]


def test_private_memory_that_no_slot_holds() -> None:
    fault = MemoryFault(0x1000, PAGE, PRIVATE, 14)
    (cause,) = judge(Evidence(gpa=0x1000, failure=fault))
    assert cause.kind is Kind.NO_SLOT
    assert "private" in cause.what


def test_broken_memory_by_the_errno_alone() -> None:
    (cause,) = judge(evidence(SHM, failure=MemoryFault(0x1000, PAGE, 0, EHWPOISON)))
    assert (cause.kind, cause.resolvable) == (Kind.HWPOISON, False)


@pytest.mark.parametrize("shift", [-(1 << 12), 0, 0x20, 1 << 12])
def test_broken_memory_by_the_signal_alone(shift: int) -> None:
    """It names a page; of an access over two, the other may be whatever it is."""
    (mapping,) = vma.parse(UFFD)
    known = evidence(UFFD, failure=Poisoned(mapping.start + 0x3000 + shift, 12), has_page=False)
    (cause,) = judge(known)
    is_it = 0 <= shift < 1 << 12
    assert (cause.kind is Kind.HWPOISON) is is_it
    assert cause.certain


def test_broken_memory_whose_mapping_has_gone_since() -> None:
    known = Evidence(hva=0x7F1000003008, kind=READ, failure=Poisoned(0x7F1000000000, 21))
    (cause,) = judge(known)
    assert (cause.kind, cause.certain) == (Kind.HWPOISON, True)
    assert "the page at 0x7f1000003008 is poisoned" in cause.what


def test_an_unknown_kind_of_access_leaves_read_and_write_open() -> None:
    read_only = SHM.replace("rw-s", "r--s")
    found = judge(evidence(read_only, kind=None, page=replace(ABSENT, present=True)))
    assert [(c.kind, c.certain) for c in found] == [
        (Kind.READ_ONLY_MAPPING, False),
        (Kind.PRESENT, False),
    ]


def test_an_unknown_kind_does_not_matter_where_all_accesses_fail_alike() -> None:
    (cause,) = judge(evidence(UFFD, kind=None, has_page=False))
    assert (cause.kind, cause.certain) == (Kind.UFFD_MISSING, True)


def test_an_access_without_any_address() -> None:
    (cause,) = judge(Evidence(failure=BARE))
    assert (cause.kind, cause.resolvable, cause.certain) == (Kind.UNKNOWN, False, False)


def test_every_cause_reads_as_one_sentence() -> None:
    for text in (DMA_BUF, HUGETLB, SHM, UFFD):
        for cause in judge(evidence(text, has_page=False)):
            assert cause.what
            assert "\n" not in str(cause)
            assert ("cannot be resolved" in str(cause)) is not cause.resolvable
