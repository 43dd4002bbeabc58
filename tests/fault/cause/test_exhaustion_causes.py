"""Causes in what has run out, made to happen to a running vCPU.

Each limit here is one that the test made for itself, so that nothing else on the machine can feel
it; only the pool of huge pages is the machine's, and is touched only where it is empty and unused.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from guestfault.fault.access import Access, AccessKind, FoundBy
from guestfault.fault.cause.record import Kind, Remedy
from guestfault.fault.cause.why import why
from guestfault.fault.outcome import BareFault, Io
from guestfault.linux.cgroup import memory_limits
from guestfault.linux.hugetlb import POOLS, pools
from guestfault.linux.ioctl import call, check, libc
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.linux.mmu_notifier import invalidating
from guestfault.linux.mounts import mount_points
from guestfault.memory.slots import MemorySlot
from guestfault.uapi import mman

from .conftest import Machine, open_system

PAGE, HUGE = 4096, 2 << 20
READ, WRITE = AccessKind.READ, AccessKind.WRITE
RW = mman.PROT_READ | mman.PROT_WRITE
TARGET = 2 << 20

SYS_FSOPEN, SYS_FSCONFIG, SYS_FSMOUNT = 430, 431, 432
MCL_CURRENT = 1
FSCONFIG_SET_STRING, FSCONFIG_CMD_CREATE = 1, 6


@pytest.fixture
def tmpfs() -> Iterator[int]:
    """A directory descriptor of a tmpfs of 8 pages that is mounted nowhere and seen by nobody."""
    syscall = libc.syscall
    fs = syscall(SYS_FSOPEN, b"tmpfs", 0)
    if fs < 0:
        pytest.skip(f"needs CAP_SYS_ADMIN for a tmpfs: {os.strerror(ctypes.get_errno())}")
    check(call(syscall, SYS_FSCONFIG, fs, FSCONFIG_SET_STRING, b"size", b"32k", 0), "fsconfig")
    check(call(syscall, SYS_FSCONFIG, fs, FSCONFIG_CMD_CREATE, None, None, 0), "fsconfig")
    mount = check(call(syscall, SYS_FSMOUNT, fs, 0, 0), "fsmount")
    os.close(fs)
    yield mount
    os.close(mount)


@pytest.mark.parametrize("kind", [READ, WRITE])
def test_tmpfs_full(machine, tmpfs, kind):
    ram = os.open("ram", os.O_RDWR | os.O_CREAT, dir_fd=tmpfs)
    other = os.open("other", os.O_RDWR | os.O_CREAT, dir_fd=tmpfs)
    os.ftruncate(ram, 16 * PAGE)
    os.pwrite(ram, bytes(PAGE), 0)
    assert os.pwrite(other, bytes(16 * PAGE), 0) == 7 * PAGE, "it takes what room there is"
    address = check(call(libc.mmap, None, 16 * PAGE, RW, mman.MAP_SHARED, ram, 0), "mmap")
    machine.back(address, 16 * PAGE)
    assert isinstance(machine.access(kind), Io), "a page that the file has"
    failure = machine.access(kind, PAGE)
    assert failure == BareFault(14)
    (cause,) = machine.causes(failure)
    assert (cause.kind, cause.by, cause.certain) == (
        Kind.FILE_SYSTEM_FULL,
        Remedy.FREE_SPACE,
        True,
    )
    assert "0 bytes of 32 KiB free" in cause.what
    os.ftruncate(other, 0)
    assert machine.completes()
    with invalidating(address, address + 16 * PAGE):
        call(libc.munmap, address, 16 * PAGE)
    os.close(ram)
    os.close(other)


@pytest.fixture
def empty_pool() -> Path:
    """The directory of the 2 MiB pool, if nobody has put pages in it."""
    pool = next((p for p in pools() if p.page_size == HUGE), None)
    if pool is None:
        pytest.skip("needs a kernel with 2 MiB hugetlb pages")
    if pool.total or pool.overcommit:
        pytest.skip("needs an empty hugetlb pool, and this machine uses its own")
    return Path(POOLS, "hugepages-2048kB")


def test_hugetlb_pool_empty(machine, empty_pool):
    with Memfd("huge", HUGE, huge_page_size=HUGE) as file, Mapping.from_memfd(file) as guest:
        machine.back(guest.address, HUGE)
        failure = machine.access(WRITE, PAGE)
        assert failure == BareFault(14)
        (cause,) = machine.causes(failure)
        assert (cause.kind, cause.by, cause.certain) == (
            Kind.HUGETLB_POOL_EMPTY,
            Remedy.ADD_HUGE_PAGES,
            True,
        )
        assert "0 of 0 are free" in cause.what
        assert str(empty_pool) in cause.how
        if not os.access(empty_pool / "nr_overcommit_hugepages", os.W_OK):
            return  # the cause is named; only root can try the mend
        # One page, on loan from ordinary memory for as long as this test has it.
        (empty_pool / "nr_overcommit_hugepages").write_text("1")
        try:
            assert machine.completes()
        finally:
            (empty_pool / "nr_overcommit_hugepages").write_text("0")


# -- a memory cgroup -----------------------------------------------------------------------------


@pytest.fixture
def memory_cgroup() -> Iterator[Path]:
    """A group of our own below ours, in which the OOM killer is off: at the limit a fault fails.

    Only version 1 can turn it off.  With it, the group's one process would be killed instead.
    """
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except FileNotFoundError:
        pytest.skip("needs control groups")
    ours = next((line.split(":")[2] for line in lines if ":memory:" in line), None)
    roots = mount_points("cgroup", "memory")
    if ours is None or not roots:
        pytest.skip("needs the memory controller of cgroup version 1, whose OOM killer can be off")
    group = roots[0] / ours.lstrip("/") / f"guestfault-test-{os.getpid()}"
    try:
        group.mkdir()
        (group / "memory.oom_control").write_text("1")
    except OSError as error:
        if group.exists():
            group.rmdir()
        pytest.skip(f"needs leave to make a memory cgroup: {error}")
    yield group
    group.rmdir()


def test_memory_cgroup_at_its_limit(memory_cgroup):
    """The VMM is a child in a group that its guest's memory has filled; it is judged from outside.

    At the limit the child must not need one page more, of its own or of the kernel's: it speaks
    through a page that is there, and the parent waits for a bounded time.  Of ``/dev/kvm`` only: to
    lock the software KVM's memory would take a gigabyte for its translations.
    """
    open_system("/dev/kvm").close()
    board = mmap.mmap(-1, PAGE)
    board[0] = 0
    child = os.fork()
    if child == 0:
        try:
            _vmm_at_its_limit(memory_cgroup, board)
        finally:
            os._exit(1)
    try:
        assert _wait(board) == FAILED
        hva = int.from_bytes(board[8:16], "little")
        slot = MemorySlot(TARGET, HUGE, hva, 1)
        access = Access(TARGET + HUGE - PAGE, 8, FoundBy.DECODE, slot=slot, kind=WRITE)
        cause = why(access, BareFault(14), pid=child)
        assert (cause.kind, cause.by) == (Kind.MEMORY_CGROUP_LIMIT, Remedy.RAISE_MEMORY_LIMIT)
        assert str(memory_cgroup) in cause.what
        assert str(memory_cgroup / "memory.limit_in_bytes") in cause.how
        (memory_cgroup / "memory.limit_in_bytes").write_text("-1")
        board[0] = RAISED
        assert _wait(board) == COMPLETED
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


FAILED, RAISED, COMPLETED, OTHERWISE = 1, 2, 3, 4


def _vmm_at_its_limit(group: Path, board: mmap.mmap) -> None:
    machine = Machine(open_system("/dev/kvm"))
    check(call(libc.mlockall, MCL_CURRENT), "mlockall")  # copies what fork shares, too
    file = Memfd("limited", HUGE)
    guest = Mapping.from_memfd(file)
    guest.no_hugepage()
    board[8:16] = guest.address.to_bytes(8, "little")
    machine.back(guest.address, HUGE)
    (group / "cgroup.procs").write_text(str(os.getpid()))
    assert machine.access(WRITE) == machine.access(WRITE)  # tables and caches are there now
    guest.protect(HUGE - PAGE, PAGE, mman.PROT_NONE)
    assert machine.access(WRITE, HUGE - PAGE) == BareFault(14)
    guest.protect(HUGE - PAGE, PAGE, RW)
    usage = int((group / "memory.usage_in_bytes").read_text())
    (group / "memory.limit_in_bytes").write_text(str(usage + (1 << 20)))
    filled = PAGE
    while guest.populate_write(filled, PAGE) == 0:
        filled += PAGE
    board[0] = FAILED if machine.run() == BareFault(14) else OTHERWISE
    while board[0] != RAISED:
        time.sleep(0.01)
    board[0] = COMPLETED if machine.completes() else OTHERWISE
    time.sleep(60)


def _wait(board: mmap.mmap) -> int:
    deadline = time.monotonic() + 10
    while board[0] in (0, RAISED):
        assert time.monotonic() < deadline, "the child is stuck"
        time.sleep(0.01)
    return board[0]


def test_a_limit_that_is_far_away_is_no_cause(ram):
    access = Access(None, 8, FoundBy.DECODE, hva=ram.guest.address, kind=WRITE)
    if any(limit.room < 1 << 20 for limit in memory_limits()):
        pytest.skip("this very process is near its limit")
    assert why(access, BareFault(14)).kind is Kind.NOT_MAPPED_IN
