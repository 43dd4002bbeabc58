import ctypes
import os
import signal
import threading
from mmap import PAGESIZE

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.linux import process_memory
from guestfault.linux.mapping import Mapping
from guestfault.linux.userfaultfd import Mode
from guestfault.uapi import mman as uapi

pytestmark = pytest.mark.timeout(30)

SIZE = 200_000  # several scratch files long


@pytest.fixture(scope="module")
def memory():
    with Mapping.anonymous(64 * PAGESIZE) as m:
        m.view()[:SIZE] = bytes(n * 7 & 0xFF for n in range(SIZE))
        yield m


@given(st.data())
def test_read_is_what_is_there(memory, data):
    offset = data.draw(st.integers(0, SIZE))
    size = data.draw(st.integers(0, SIZE - offset))
    assert (
        process_memory.read(memory.address + offset, size) == memory.view()[offset : offset + size]
    )


@given(st.data())
def test_write_is_what_read_reads(memory, data):
    offset = data.draw(st.integers(0, SIZE))
    size = data.draw(st.integers(0, SIZE - offset))
    byte = data.draw(st.integers(0, 255))
    before = bytes(memory.view())
    assert process_memory.write(memory.address + offset, bytes([byte]) * size)
    after = before[:offset] + bytes([byte]) * size + before[offset + size :]
    assert memory.view() == after


@pytest.mark.parametrize("buffer", [bytes, bytearray, memoryview])
def test_write_takes_any_buffer_of_bytes(memory, buffer):
    for size in (3, 150_000):
        assert process_memory.write(memory.address, buffer(b"\xa5" * size))
        assert process_memory.read(memory.address, size) == b"\xa5" * size


def test_protection_is_honoured(ram):
    ram.fill(0, 1)
    ram.guest.protect(0, PAGESIZE, uapi.PROT_READ)
    assert process_memory.read(ram.page(0), 8) == b"\1" * 8
    assert not process_memory.write(ram.page(0), b"x" * 8)
    ram.guest.protect(0, PAGESIZE, uapi.PROT_NONE)
    assert process_memory.read(ram.page(0), 8) is None
    assert not process_memory.write(ram.page(0), b"x" * 8)
    assert ram.host.view()[:8] == b"\1" * 8


def test_a_range_that_ends_where_it_may_not_fails_as_a_whole(ram):
    ram.guest.protect(PAGESIZE, PAGESIZE, uapi.PROT_NONE)
    assert process_memory.read(ram.page(1) - 4, 4) == bytes(4)
    assert process_memory.read(ram.page(1) - 4, 8) is None
    assert not process_memory.write(ram.page(1) - 4, bytes(8))
    assert process_memory.read(ram.page(1) - 4, 100_000) is None
    assert not process_memory.write(ram.page(1) - 4, bytes(100_000))


def test_past_the_end_of_the_file_there_is_no_signal(ram):
    ram.file.truncate(7 * PAGESIZE)
    assert process_memory.read(ram.page(7), 1) is None
    assert not process_memory.write(ram.page(7), b"x")


@pytest.mark.parametrize("address", [0, 1 << 47, 1 << 63, (1 << 64) - 8, 0xFFFFFFFF81000000])
def test_addresses_that_are_nobodys(address):
    assert process_memory.read(address, 8) is None
    assert not process_memory.write(address, bytes(8))


def test_it_is_no_proc_self_mem(ram):
    """FOLL_FORCE would write where our own protection forbids it, to private memory."""
    with Mapping.anonymous(PAGESIZE, prot=uapi.PROT_READ) as m:
        with open("/proc/self/mem", "r+b", buffering=0) as mem:
            mem.seek(m.address)
            assert mem.write(b"forced") == 6
        assert not process_memory.write(m.address, b"x")
        assert process_memory.read(m.address, 6) == b"forced"


def test_a_blocked_read_and_write_hold_no_gil(ram, open_uffd, start):
    uffd = open_uffd()
    uffd.register(ram.guest.address, ram.guest.size, Mode.MISSING | Mode.MINOR)
    reader = start(process_memory.read, ram.page(0) + 8, 4)
    writer = start(process_memory.write, ram.page(1) + 8, b"abcd")
    assert reader.sleeps()
    assert writer.sleeps()
    ram.fill(0, 0x11)
    ram.fill(1, 0x22)
    uffd.continue_(ram.page(0), 2 * PAGESIZE)
    assert reader.result() == b"\x11" * 4
    assert writer.result() is True
    assert ram.host.view()[PAGESIZE + 8 : PAGESIZE + 12] == b"abcd"


def test_a_signal_does_not_end_the_wait(ram, open_uffd, start):
    uffd = open_uffd()
    uffd.register(ram.guest.address, ram.guest.size, Mode.MISSING)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        reader = start(process_memory.read, ram.page(0), 4)
        assert reader.sleeps()
        signal.pthread_kill(reader.ident, signal.SIGUSR1)
        assert reader.sleeps()
        assert uffd.zeropage(ram.page(0), PAGESIZE).done == PAGESIZE
        assert reader.result() == bytes(4)
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_threads_do_not_share_a_scratch_file(memory):
    wrong = []

    def read_own(index):
        address = memory.address + index * PAGESIZE
        process_memory.write(address, bytes([index]) * 64)
        for _ in range(2000):
            if process_memory.read(address, 64) != bytes([index]) * 64:
                wrong.append(index)

    threads = [threading.Thread(target=read_own, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_forked_child_has_its_own_scratch_file():
    """With the parent's, the two would read each other's bytes."""
    mine = ctypes.create_string_buffer(b"parent--", 8)
    address = ctypes.addressof(mine)
    assert process_memory.read(address, 8) == b"parent--"
    pid = os.fork()
    if pid == 0:
        mine.raw = b"child---"
        ok = all(process_memory.read(address, 8) == b"child---" for _ in range(5000))
        os._exit(0 if ok else 1)
    ok = all(process_memory.read(address, 8) == b"parent--" for _ in range(5000))
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    assert ok


def test_a_thread_takes_its_descriptors_along(start):
    address = ctypes.addressof(ctypes.create_string_buffer(8))
    start(process_memory.read, address, 8).result()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        start(process_memory.read, address, 8).result()
    assert len(os.listdir("/proc/self/fd")) <= before
