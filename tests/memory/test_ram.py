"""Guest RAM: two views of the same pages, of which one is filled and the other lets them in."""

import os

import pytest

from guestfault.linux.pagemap import Pagemap
from guestfault.memory.ram import PAGE_SIZE, GuestRam, MemorySizeError


@pytest.mark.parametrize("size", [0, -4096, 1, 4097])
def test_a_size_that_cannot_be(size):
    with pytest.raises(MemorySizeError, match=str(size)) as caught:
        GuestRam(size)
    assert caught.value.size == size


def test_a_page_written_in_the_host_view_is_absent_from_the_guest_view_until_let_in():
    with GuestRam(4 * PAGE_SIZE) as ram, Pagemap() as pagemap:
        assert ram.pages == 4
        ram.bytes[PAGE_SIZE : 2 * PAGE_SIZE] = b"\x5a" * PAGE_SIZE
        assert pagemap.present(ram.host.address + PAGE_SIZE)
        assert not pagemap.present(ram.guest.address + PAGE_SIZE)
        assert ram.guest.populate_write(PAGE_SIZE, PAGE_SIZE) == 0
        assert pagemap.present(ram.guest.address + PAGE_SIZE)
        assert not pagemap.present(ram.guest.address)
        assert bytes(ram.guest.view()[PAGE_SIZE : 2 * PAGE_SIZE]) == b"\x5a" * PAGE_SIZE


def test_nothing_is_left_behind():
    def held():
        with open("/proc/self/maps") as maps:
            return len(os.listdir("/proc/self/fd")), maps.read().count("leak-test")

    before = held()
    for _ in range(50):
        GuestRam(16 * PAGE_SIZE, name="leak-test").close()
    assert held() == before


def test_size_is_not_use():
    with GuestRam(1 << 36) as ram:
        ram.bytes[1 << 35] = 1
        assert ram.bytes[1 << 35] == 1
