import ctypes
import errno
import select
from mmap import PAGESIZE

import pytest

from guestfault.dialect.interface import EHWPOISON
from guestfault.errors import KernelError, Unavailable
from guestfault.linux import mmu_notifier, process_memory
from guestfault.linux.ioctl import call, libc
from guestfault.linux.mapping import Mapping
from guestfault.linux.pagemap import Pagemap
from guestfault.linux.userfaultfd import (
    Feature,
    Ioctl,
    Mode,
    PageFault,
    Progress,
    Remap,
    Remove,
    Unmap,
    Userfaultfd,
)
from guestfault.uapi import mman

pytestmark = pytest.mark.timeout(20)

BOTH = Mode.MISSING | Mode.MINOR


@pytest.fixture
def uffd(ram, open_uffd):
    """A userfaultfd on the whole guest view, for missing and minor faults."""
    opened = open_uffd(Feature.THREAD_ID)
    opened.register(ram.guest.address, ram.guest.size, BOTH)
    return opened


@pytest.fixture
def page():
    """A page of 0x5A that is not registered anywhere."""
    with Mapping.anonymous(PAGESIZE) as m:
        m.view()[:] = b"\x5a" * PAGESIZE
        yield m.address


def next_events(uffd):
    """Wait until there are events, and read them."""
    assert select.select([uffd], [], [], 10)[0], "no event came"
    return uffd.read_events()


# Opening


def test_handshake_tells_what_there_is(open_uffd):
    uffd = open_uffd(Feature.EXACT_ADDRESS | Feature.SIGBUS)
    assert uffd.features == (Feature.EXACT_ADDRESS | Feature.SIGBUS) & uffd.offered
    assert Ioctl.REGISTER | Ioctl.UNREGISTER | Ioctl.API in uffd.ioctls
    assert uffd.fileno() == uffd.fd


def test_what_the_kernel_lacks_is_dropped_unless_required(open_uffd):
    unknown = 1 << 50
    assert open_uffd(Feature.THREAD_ID | unknown).features == Feature.THREAD_ID
    with pytest.raises(Unavailable, match="use a newer kernel"):
        Userfaultfd.open(required=unknown)


def test_close_may_be_repeated(open_uffd):
    uffd = open_uffd()
    uffd.close()
    uffd.close()
    with pytest.raises(KernelError, match="EBADF"):
        uffd.read_events()


# Registration


def test_register_says_what_can_be_done(ram, open_uffd):
    ioctls = open_uffd().register(ram.guest.address, ram.guest.size, BOTH)
    assert Ioctl.COPY | Ioctl.CONTINUE | Ioctl.WAKE in ioctls


def test_register_refuses_with_data(ram, uffd, open_uffd):
    with pytest.raises(KernelError) as caught:
        open_uffd().register(ram.guest.address, PAGESIZE, Mode.MISSING)
    assert (caught.value.call, caught.value.errno) == ("UFFDIO_REGISTER", errno.EBUSY)
    assert "Mode.MISSING" in str(caught.value)
    with pytest.raises(KernelError) as caught:
        uffd.register(PAGESIZE, PAGESIZE, Mode.MISSING)
    assert caught.value.errno == errno.EINVAL


def test_unregister_gives_the_range_back(ram, uffd, start):
    reader = start(process_memory.read, ram.page(0), 1)
    assert next_events(uffd)
    uffd.unregister(ram.guest.address, ram.guest.size)
    assert reader.result() == b"\0"
    with pytest.raises(KernelError, match="UFFDIO_UNREGISTER: EINVAL"):
        uffd.unregister(1, PAGESIZE)


# Faults, served while the one who made them sleeps


def test_a_missing_fault_is_filled_by_copy(ram, uffd, page, start):
    reader = start(process_memory.read, ram.page(2) + 100, 4)
    (fault,) = next_events(uffd)
    assert fault == PageFault(ram.page(2), False, False, False, reader.thread_id)
    assert uffd.copy(ram.page(2), page, PAGESIZE) == Progress(PAGESIZE, 0)
    assert reader.result() == b"\x5a" * 4
    assert uffd.read_events() == []


def test_a_minor_fault_is_filled_by_continue(ram, uffd, start):
    ram.fill(3, 0x77)
    writer = start(process_memory.write, ram.page(3), b"new")
    (fault,) = next_events(uffd)
    assert fault == PageFault(ram.page(3), True, False, True, writer.thread_id)
    assert uffd.continue_(ram.page(3), PAGESIZE) == Progress(PAGESIZE, 0)
    assert writer.result() is True
    assert bytes(ram.host.view()[3 * PAGESIZE :][:4]) == b"new\x77"


def test_a_fault_of_populate_is_like_any_other(ram, uffd, start):
    populate = start(ram.guest.populate_write, PAGESIZE, PAGESIZE)
    (fault,) = next_events(uffd)
    assert (fault.address, fault.write, fault.minor) == (ram.page(1), True, False)
    assert uffd.zeropage(ram.page(1), PAGESIZE) == Progress(PAGESIZE, 0)
    assert populate.result() == 0


def test_many_sleepers_come_in_one_read(ram, uffd, start):
    readers = [start(process_memory.read, ram.page(n), 1) for n in range(8)]
    faults = []
    while len(faults) < 8:
        faults += next_events(uffd)
    assert {fault.address for fault in faults} == {ram.page(n) for n in range(8)}
    assert {fault.thread_id for fault in faults} == {reader.thread_id for reader in readers}
    for n in range(8):
        ram.fill(n, n)
    assert uffd.continue_(ram.guest.address, ram.guest.size) == Progress(ram.guest.size, 0)
    assert [reader.result() for reader in readers] == [bytes([n]) for n in range(8)]


def test_thread_id_and_exact_address_only_when_asked_for(ram, open_uffd, page, start):
    for feature, address in [(0, ram.page(0)), (Feature.EXACT_ADDRESS, ram.page(0) + 123)]:
        uffd = open_uffd(required=feature)
        uffd.register(ram.guest.address, PAGESIZE, Mode.MISSING)
        reader = start(process_memory.read, ram.page(0) + 123, 1)
        assert next_events(uffd) == [PageFault(address, False, False, False, None)]
        uffd.close()
        assert reader.result() == b"\0"
        ram.file.punch_hole(0, PAGESIZE)


def test_minor_alone_lets_shmem_make_up_zeros(ram, open_uffd):
    """The trap that register() warns of: a page in no cache is no minor fault."""
    uffd = open_uffd()
    uffd.register(ram.guest.address, ram.guest.size, Mode.MINOR)
    assert process_memory.read(ram.page(0), 4) == bytes(4)
    assert uffd.read_events() == []


def test_closing_hands_zeros_to_the_sleeper(ram, uffd, start):
    """The trap that close() warns of."""
    reader = start(process_memory.read, ram.page(0), 4)
    assert next_events(uffd)
    uffd.close()
    assert reader.result() == bytes(4)


# Progress


def test_eexist_does_not_wake_and_wake_does(ram, uffd, page, start):
    reader = start(process_memory.read, ram.page(0), 1)
    assert next_events(uffd)
    assert uffd.copy(ram.page(0), page, PAGESIZE, dontwake=True) == Progress(PAGESIZE, 0)
    assert uffd.copy(ram.page(0), page, PAGESIZE) == Progress(0, errno.EEXIST)
    assert uffd.continue_(ram.page(0), PAGESIZE) == Progress(0, errno.EEXIST)
    assert reader.sleeps()
    uffd.wake(ram.page(0), PAGESIZE)
    assert reader.result() == b"\x5a"


def test_a_range_stops_before_the_page_that_is_there(ram, uffd):
    for n in range(4):
        ram.fill(n, n)
    assert uffd.continue_(ram.page(2), PAGESIZE) == Progress(PAGESIZE, 0)
    first = uffd.continue_(ram.page(0), 4 * PAGESIZE)
    assert first == Progress(2 * PAGESIZE, errno.EAGAIN)
    at = ram.page(0) + first.done
    assert uffd.continue_(at, 4 * PAGESIZE - first.done) == Progress(0, errno.EEXIST)
    assert uffd.continue_(at + PAGESIZE, PAGESIZE) == Progress(PAGESIZE, 0)


def test_copy_stops_where_its_source_ends(ram, uffd):
    with Mapping.anonymous(2 * PAGESIZE) as source:
        source.protect(PAGESIZE, PAGESIZE, mman.PROT_NONE)
        first = uffd.copy(ram.page(0), source.address, 2 * PAGESIZE)
        assert first == Progress(PAGESIZE, errno.EAGAIN)
        second = uffd.copy(ram.page(1), source.address + PAGESIZE, PAGESIZE)
        assert second == Progress(0, errno.EFAULT)


def test_continue_makes_nothing_up(ram, uffd):
    assert uffd.continue_(ram.page(0), PAGESIZE) == Progress(0, errno.EFAULT)
    with Pagemap() as pagemap:
        assert not pagemap.present(ram.page(0))


def test_failures_of_the_range_are_data(ram, uffd, page):
    assert uffd.copy(ram.page(0) + 1, page, PAGESIZE) == Progress(0, errno.EINVAL)
    assert uffd.copy(ram.page(0), page, 0) == Progress(0, errno.EINVAL)
    assert uffd.copy(ram.host.address, page, PAGESIZE) == Progress(0, errno.ENOENT)
    assert uffd.continue_(ram.host.address, PAGESIZE) == Progress(0, errno.ENOENT)
    assert uffd.zeropage(ram.host.address, PAGESIZE) == Progress(0, errno.ENOENT)
    assert uffd.writeprotect(ram.page(0), PAGESIZE, protect=True).errno == errno.ENOENT
    with pytest.raises(KernelError, match="UFFDIO_WAKE: EINVAL"):
        uffd.wake(ram.page(0), 1)


def test_a_closed_userfaultfd_is_data_too(ram, uffd, page):
    uffd.close()
    assert uffd.copy(ram.page(0), page, PAGESIZE) == Progress(0, errno.EBADF)


# Modes of failing instead of sleeping


def test_sigbus_feature_makes_populate_fail_instead_of_sleep(ram, open_uffd):
    uffd = open_uffd(required=Feature.SIGBUS)
    uffd.register(ram.guest.address, ram.guest.size, BOTH)
    ram.fill(1, 1)
    for n in (0, 1):  # missing, minor
        assert ram.guest.populate_read(n * PAGESIZE, PAGESIZE) == -errno.EFAULT
        assert ram.guest.populate_write(n * PAGESIZE, PAGESIZE) == -errno.EFAULT
        assert process_memory.read(ram.page(n), 1) is None
    assert uffd.read_events() == []
    assert uffd.continue_(ram.page(1), PAGESIZE).errno == 0
    assert ram.guest.populate_write(PAGESIZE, PAGESIZE) == 0


def test_user_mode_only_fails_accesses_of_the_kernel(ram, open_uffd):
    uffd = open_uffd(user_mode_only=True)
    uffd.register(ram.guest.address, ram.guest.size, BOTH)
    assert process_memory.read(ram.page(0), 1) is None
    assert ram.guest.populate_read(0, PAGESIZE) == -errno.EFAULT
    assert uffd.read_events() == []


def test_poison(ram, open_uffd):
    uffd = open_uffd()
    if Feature.POISON not in uffd.offered:
        pytest.skip("needs UFFD_FEATURE_POISON (Linux 6.6)")
    assert Ioctl.POISON in uffd.register(ram.guest.address, ram.guest.size, BOTH)
    assert uffd.poison(ram.page(0), PAGESIZE) == Progress(PAGESIZE, 0)
    assert uffd.poison(ram.page(0), PAGESIZE) == Progress(0, errno.EEXIST)
    assert ram.guest.populate_read(0, PAGESIZE) == -EHWPOISON
    assert process_memory.read(ram.page(0), 1) is None
    assert ram.host.view()[0] == 0


# Other events


def test_discard_sleeps_until_its_remove_is_read_and_blocks_fills(ram, open_uffd, start):
    uffd = open_uffd(required=Feature.EVENT_REMOVE)
    uffd.register(ram.guest.address, ram.guest.size, BOTH)
    ram.fill(0, 1)
    ram.fill(1, 1)
    assert uffd.continue_(ram.page(0), PAGESIZE).errno == 0
    discard = start(ram.guest.discard, 0, PAGESIZE)
    assert select.select([uffd], [], [], 10)[0]
    assert discard.sleeps()
    assert uffd.continue_(ram.page(1), PAGESIZE) == Progress(0, errno.EAGAIN)
    assert uffd.read_events() == [Remove(ram.page(0), ram.page(1))]
    discard.result()
    assert uffd.continue_(ram.page(0), 2 * PAGESIZE) == Progress(2 * PAGESIZE, 0)


def test_a_punched_hole_is_no_event(ram, open_uffd, start):
    """The trap that Memfd.punch_hole() warns of: nobody is told but by the next fault."""
    uffd = open_uffd(required=Feature.EVENT_REMOVE)
    uffd.register(ram.guest.address, ram.guest.size, BOTH)
    ram.fill(0, 1)
    assert uffd.continue_(ram.page(0), PAGESIZE).errno == 0
    ram.file.punch_hole(0, PAGESIZE)
    assert uffd.read_events() == []
    reader = start(process_memory.read, ram.page(0), 1)
    assert next_events(uffd) == [PageFault(ram.page(0), False, False, False, None)]
    assert uffd.zeropage(ram.page(0), PAGESIZE).errno == 0
    assert reader.result() == b"\0"


def test_unmap_and_remap_events(open_uffd, start):
    uffd = open_uffd(required=Feature.EVENT_UNMAP | Feature.EVENT_REMAP)
    mremap = libc.mremap
    mremap.argtypes = [ctypes.c_void_p, *[ctypes.c_size_t] * 2, ctypes.c_int, ctypes.c_void_p]
    mremap.restype = ctypes.c_ssize_t
    here, there = Mapping.anonymous(PAGESIZE), Mapping.anonymous(PAGESIZE)
    uffd.register(here.address, PAGESIZE, Mode.MISSING)
    flags = mman.MREMAP_MAYMOVE | mman.MREMAP_FIXED
    move = start(call, mremap, here.address, PAGESIZE, PAGESIZE, flags, there.address)
    events = next_events(uffd)
    while move.sleeps(0.01):
        events += uffd.read_events()
    assert events == [Remap(here.address, there.address, PAGESIZE), Unmap(here.address, here.end)]
    assert move.result() == there.address
    end = there.end
    close = start(there.close)
    events = next_events(uffd)
    close.result()
    assert events == [Unmap(there.address, end)]


# Write protection and moving, of which the notifier chain hears


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


def test_write_protection(open_uffd, page, start, heard):
    uffd = open_uffd(required=Feature.PAGEFAULT_FLAG_WP)
    with Mapping.anonymous(2 * PAGESIZE) as m:
        whole = (m.address, m.end)
        assert Ioctl.WRITEPROTECT in uffd.register(m.address, m.size, Mode.MISSING | Mode.WP)
        for n in range(2):
            at = m.address + n * PAGESIZE
            assert uffd.copy(at, page, PAGESIZE, wp=n == 0) == Progress(PAGESIZE, 0)
        assert heard == []
        assert process_memory.write(m.address + PAGESIZE, b"x")
        writer = start(process_memory.write, m.address + 5, b"y")
        (fault,) = next_events(uffd)
        assert fault == PageFault(m.address, True, True, False, None)
        assert uffd.writeprotect(*whole[:1], m.size, protect=False) == Progress(m.size, 0)
        assert writer.result() is True
        assert heard == [whole]
        assert uffd.writeprotect(m.address, m.size, protect=True) == Progress(m.size, 0)
        assert process_memory.read(m.address + 5, 1) == b"y"
        uffd.unregister(m.address, m.size)


def test_move(open_uffd, heard):
    uffd = open_uffd()
    if Feature.MOVE not in uffd.offered:
        pytest.skip("needs UFFD_FEATURE_MOVE (Linux 6.8)")
    with Mapping.anonymous(PAGESIZE) as src, Mapping.anonymous(PAGESIZE) as dst, Pagemap() as pm:
        assert process_memory.write(src.address, b"moved")
        assert Ioctl.MOVE in uffd.register(dst.address, PAGESIZE, Mode.MISSING)
        assert uffd.move(dst.address, src.address, PAGESIZE) == Progress(PAGESIZE, 0)
        assert heard == [(src.address, src.end)]
        assert not pm.present(src.address)
        assert process_memory.read(dst.address, 5) == b"moved"
        assert uffd.move(dst.address, src.address, PAGESIZE).done == 0
