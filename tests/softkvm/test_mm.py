"""Fast and slow GUP and the copies, on this process's real memory."""

import errno
import select
import threading

import pytest

from guestfault.errors import Unavailable
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.linux.pagemap import Pagemap
from guestfault.linux.userfaultfd import Mode, Userfaultfd
from guestfault.softkvm.mm import HostMm
from guestfault.softkvm.preempt import Sleeper
from guestfault.uapi.mman import PROT_NONE, PROT_READ, PROT_WRITE

PAGE = 4096


@pytest.fixture
def mm():
    mm = HostMm()
    yield mm
    mm.close()


@pytest.fixture
def ram():
    with Memfd("test", 4 * PAGE) as file, Mapping.from_memfd(file) as ram:
        yield ram


@pytest.mark.parametrize("write", [False, True])
def test_fast_gup_never_faults_a_page_in(mm, ram, write):
    with Pagemap() as pagemap:
        assert not mm.get_user_page_fast_only(ram.address, write)
        assert not pagemap.present(ram.address)
        assert mm.get_user_pages_unlocked(ram.address, write) == 0
        assert pagemap.present(ram.address)
    assert mm.get_user_page_fast_only(ram.address + 8, False)


def test_a_page_with_no_access_is_in_the_page_tables_and_still_fails(mm, ram):
    assert ram.populate_write(0, PAGE) == 0
    ram.protect(0, PAGE, PROT_NONE)
    with Pagemap() as pagemap:
        assert pagemap.present(ram.address)
    for write in (False, True):
        assert not mm.get_user_page_fast_only(ram.address, write)
        assert mm.get_user_pages_unlocked(ram.address, write) == -errno.EFAULT


def test_a_read_only_mapping_gives_reads_only(mm, ram):
    assert ram.populate_write(0, PAGE) == 0
    ram.protect(0, PAGE, PROT_READ)
    assert mm.get_user_page_fast_only(ram.address, False)
    assert not mm.get_user_page_fast_only(ram.address, True)
    assert mm.get_user_pages_unlocked(ram.address, True) == -errno.EFAULT
    ram.protect(0, PAGE, PROT_READ | PROT_WRITE)
    assert mm.get_user_page_fast_only(ram.address, True)


def test_no_mapping_and_past_the_end_of_the_file(mm):
    with Memfd("test", PAGE) as file, Mapping.from_memfd(file, size=2 * PAGE) as ram:
        assert mm.get_user_pages_unlocked(ram.address + PAGE, False) == -errno.EFAULT
        address = ram.address
    assert mm.get_user_pages_unlocked(address, False) == -errno.EFAULT
    assert mm.copy_from_user(address, 8) is None
    assert not mm.copy_to_user(address, b"x")


def test_copies(mm, ram):
    assert mm.copy_to_user(ram.address + 10, b"hello")
    assert mm.copy_from_user(ram.address + 11, 3) == b"ell"


# -- under userfaultfd -----------------------------------------------------------------------------


@pytest.fixture
def absent(mm, ram):
    """RAM of which nothing is there, and nobody brings it in but the test."""
    try:
        uffd = Userfaultfd.open()
    except Unavailable as e:
        pytest.skip(str(e))
    with uffd:
        uffd.register(ram.address, ram.size, Mode.MISSING)
        yield uffd


class Vcpu:
    """What slow GUP must know of who asks."""

    def __init__(self):
        self.wait = Sleeper("test")
        self.signal = False

    def signal_pending(self):
        return self.signal

    def kick(self):
        self.signal = True
        self.wait.wake_up("kick")


@pytest.mark.timeout(20)
def test_without_waiting_a_page_that_must_be_waited_for_fails_at_once(mm, ram, absent):
    for write in (False, True):
        assert mm.get_user_pages_unlocked(ram.address, write, nowait=True) == -errno.EAGAIN
    assert absent.zeropage(ram.address, PAGE).done == PAGE
    for write in (False, True):
        assert mm.get_user_pages_unlocked(ram.address, write, nowait=True) == 0
    absent.unregister(ram.address, ram.size)
    assert mm.get_user_pages_unlocked(ram.address + PAGE, False, nowait=True) == 0


@pytest.mark.timeout(20)
def test_a_sleep_ends_with_the_page(mm, ram, absent):
    vcpu, results = Vcpu(), []
    asks = threading.Thread(
        target=lambda: results.append(
            mm.get_user_pages_unlocked(ram.address, True, interruptible=vcpu)
        )
    )
    asks.start()
    wait_for_fault(absent)
    assert asks.is_alive()
    assert absent.zeropage(ram.address, PAGE).done == PAGE
    asks.join()
    assert results == [0]


@pytest.mark.timeout(20)
def test_a_sleep_ends_with_a_signal_and_who_comes_back_joins_it(mm, ram, absent):
    """No fault is lost, and no second thread is put to sleep for the same page."""
    vcpu, results = Vcpu(), []

    def ask():
        results.append(mm.get_user_pages_unlocked(ram.address, True, interruptible=vcpu))

    for expected in ([-errno.EINTR], [-errno.EINTR] * 2):
        asks = threading.Thread(target=ask)
        asks.start()
        if len(expected) == 1:
            wait_for_fault(absent)
        vcpu.kick()
        asks.join()
        assert results == expected
        vcpu.signal = False
    asks = threading.Thread(target=ask)
    asks.start()
    assert absent.zeropage(ram.address, PAGE).done == PAGE
    asks.join()
    assert results[-1] == 0
    assert absent.read_events() == []  # one sleeper, one message


def wait_for_fault(uffd):
    poll = select.poll()
    poll.register(uffd.fileno(), select.POLLIN)
    assert poll.poll(10_000)
    assert uffd.read_events()


@pytest.mark.parametrize(
    ("prot", "read", "write"),
    [(PROT_NONE, False, False), (PROT_READ, True, False), (PROT_READ | PROT_WRITE, True, True)],
)
def test_which_mappings_permit_an_access(mm, ram, prot, read, write):
    ram.protect(0, PAGE, prot)
    assert mm.vma_is_valid(ram.address + 5, False) is read
    assert mm.vma_is_valid(ram.address + 5, True) is write


def test_no_mapping_permits_none(mm):
    assert not mm.vma_is_valid(PAGE, False)
