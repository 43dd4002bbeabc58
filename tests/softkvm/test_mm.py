"""Fast and slow GUP and the copies, on this process's real memory."""

import errno

import pytest

from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.linux.pagemap import Pagemap
from guestfault.softkvm.mm import HostMm
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
