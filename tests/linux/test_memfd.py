import errno
import fcntl
import os
from mmap import PAGESIZE

import pytest

from guestfault.errors import KernelError
from guestfault.linux import mmu_notifier, process_memory
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd


class Ranges:
    def __init__(self):
        self.seen = []

    def invalidate_range_start(self, start, end):
        self.seen.append((start, end))

    def invalidate_range_end(self, start, end):
        pass


@pytest.fixture
def heard():
    ranges = Ranges()
    mmu_notifier.register(ranges)
    yield ranges.seen
    mmu_notifier.unregister(ranges)


def test_a_file_without_a_name_in_the_file_system():
    with Memfd("guest-ram", 3 * PAGESIZE) as ram:
        assert os.readlink(f"/proc/self/fd/{ram.fd}") == "/memfd:guest-ram (deleted)"
        assert os.fstat(ram.fd).st_size == ram.size == 3 * PAGESIZE
        assert not os.get_inheritable(ram.fd)
        fd = ram.fd
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)
    ram.close()


def test_refusals_are_kernel_errors_and_leak_nothing():
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(KernelError) as caught:
        Memfd("ram", -1)
    assert (caught.value.call, caught.value.errno) == ("ftruncate", errno.EINVAL)
    with pytest.raises(KernelError) as caught:
        Memfd("x" * 300, PAGESIZE)
    assert (caught.value.call, caught.value.errno) == ("memfd_create", errno.EINVAL)
    assert len(os.listdir("/proc/self/fd")) == before


def test_truncate_tells_every_mapping_of_what_goes(ram, heard):
    ram.file.truncate(6 * PAGESIZE)
    assert sorted(heard) == sorted((m.address + 6 * PAGESIZE, m.end) for m in (ram.host, ram.guest))
    assert process_memory.read(ram.page(5), 1) == b"\0"
    assert process_memory.read(ram.page(6), 1) is None
    heard.clear()
    ram.file.truncate(8 * PAGESIZE)
    assert heard == []


def test_punch_hole_empties_the_page_in_every_mapping(ram, heard):
    ram.fill(1, 7)
    ram.fill(2, 8)
    with Mapping.from_memfd(ram.file, offset=2 * PAGESIZE, size=PAGESIZE) as other:
        assert process_memory.read(other.address, 1) == b"\x08"
        ram.file.punch_hole(PAGESIZE, 2 * PAGESIZE)
        assert sorted(heard) == sorted(
            [
                (ram.host.address + PAGESIZE, ram.host.address + 3 * PAGESIZE),
                (ram.page(1), ram.page(3)),
                (other.address, other.end),
            ]
        )
        assert process_memory.read(other.address, 1) == b"\0"
        assert process_memory.read(ram.page(1), 1) == b"\0"


def test_punch_hole_outside_is_an_error(ram):
    with pytest.raises(KernelError) as caught:
        ram.file.punch_hole(-PAGESIZE, PAGESIZE)
    assert (caught.value.call, caught.value.errno) == ("fallocate", errno.EINVAL)


def test_seals():
    with Memfd("ram", PAGESIZE, sealable=True) as ram:
        ram.seal(fcntl.F_SEAL_SHRINK)
        ram.truncate(2 * PAGESIZE)
        with pytest.raises(KernelError) as caught:
            ram.truncate(PAGESIZE)
        assert caught.value.errno == errno.EPERM
        assert ram.size == 2 * PAGESIZE
    with Memfd("ram", PAGESIZE) as ram, pytest.raises(KernelError) as caught:
        ram.seal(fcntl.F_SEAL_SHRINK)
    assert (caught.value.call, caught.value.errno) == ("F_ADD_SEALS", errno.EPERM)


def test_huge_pages_come_from_the_pool_of_that_size():
    try:
        ram = Memfd("ram", 2 << 20, huge_page_size=2 << 20)
    except KernelError as e:
        pytest.skip(f"no hugetlb pages of 2 MiB: {e}")
    with ram:
        assert os.fstatvfs(ram.fd).f_bsize == 2 << 20


def test_a_huge_page_size_that_does_not_exist():
    with pytest.raises(KernelError, match="memfd_create"):
        Memfd("ram", 1 << 40, huge_page_size=1 << 40)
