"""The ways in which a page can be absent: each lets pages in, shuts, fails and reopens.

No test touches a registered page from Python: the accesses are the kernel's, without the GIL.
"""

import errno
import threading

import pytest

from guestfault.errors import Unavailable
from guestfault.linux import process_memory
from guestfault.linux.mapping import populate_read
from guestfault.linux.pagemap import Pagemap
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.view import Protected, Registered, Unpopulated

PAGES = 8
KINDS = {
    "unpopulated": Unpopulated,
    "protected": Protected,
    "failing": lambda ram: Registered(ram, sigbus=True),
    "waiting": lambda ram: Registered(ram, sigbus=False),
}


@pytest.fixture
def ram():
    with GuestRam(PAGES * PAGE_SIZE) as ram:
        yield ram


@pytest.fixture
def make(ram):
    made = []

    def make(kind):
        try:
            made.append(KINDS[kind](ram))
        except Unavailable as why:
            pytest.skip(f"needs userfaultfd: {why}")
        return made[-1]

    yield make
    for view in made:
        view.close()


class Sleeper:
    """An access to a page of the guest view in another thread, as KVM would make it."""

    def __init__(self, ram, page):
        self.result = None
        self.thread = threading.Thread(target=self._access, args=(ram, page), daemon=True)
        self.thread.start()

    def _access(self, ram, page):
        self.result = populate_read(ram.guest.address + page * PAGE_SIZE, PAGE_SIZE)

    def sleeps(self):
        self.thread.join(0.1)
        return self.thread.is_alive()

    def wakes(self):
        self.thread.join(10)
        assert not self.thread.is_alive(), "nobody woke it"
        return self.result


def fill(ram, page, byte):
    ram.bytes[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes([byte]) * PAGE_SIZE


def read(ram, page):
    """What the kernel reads there; ``None`` if it cannot."""
    return process_memory.read(ram.guest.address + page * PAGE_SIZE + 9, 1)


def cached(ram):
    """Which pages the memory file has, not counting what asking brings about."""
    with Pagemap() as pagemap:
        return [pagemap.present(ram.host.address + i * PAGE_SIZE) for i in range(PAGES)]


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_brought_in_is_what_was_written(make, ram, kind):
    view = make(kind)
    for page in (1, 2, 5):
        fill(ram, page, page)
    view.bring_in(PAGE_SIZE, 2 * PAGE_SIZE)
    view.bring_in(5 * PAGE_SIZE, PAGE_SIZE)
    view.bring_in(5 * PAGE_SIZE, PAGE_SIZE)  # again
    for page in (1, 2, 5):
        assert read(ram, page) == bytes([page])


@pytest.mark.parametrize("kind", ["protected", "failing"])
def test_what_is_not_brought_in_fails(make, ram, kind):
    view = make(kind)
    fill(ram, 0, 1)
    fill(ram, 1, 2)
    view.bring_in(0, PAGE_SIZE)
    assert read(ram, 0) == b"\1"
    assert read(ram, 1) is None  # in the page cache
    assert read(ram, 2) is None  # nowhere


def test_what_is_not_brought_in_is_waited_for(make, ram):
    view = make("waiting")
    fill(ram, 1, 7)
    sleeper = Sleeper(ram, 1)
    assert sleeper.sleeps()
    view.bring_in(PAGE_SIZE, PAGE_SIZE)
    assert sleeper.wakes() == 0
    assert read(ram, 1) == b"\7"


def test_bringing_in_what_is_in_already_wakes_who_sleeps_there(make, ram):
    """EEXIST: the kernel wakes nobody."""
    view = make("waiting")
    fill(ram, 1, 7)
    fill(ram, 2, 8)
    sleeper = Sleeper(ram, 1)
    assert sleeper.sleeps()
    # Let in without the wake, as another thread's range would be for a moment.
    view.uffd.continue_(ram.guest.address + PAGE_SIZE, PAGE_SIZE, dontwake=True)
    assert sleeper.sleeps()
    view.bring_in(PAGE_SIZE, 2 * PAGE_SIZE)
    assert sleeper.wakes() == 0
    assert read(ram, 2) == b"\x08"


def test_unpopulated_lets_no_neighbour_in(make, ram):
    view = make("unpopulated")
    for page in range(PAGES):
        fill(ram, page, page)
    view.bring_in(3 * PAGE_SIZE, PAGE_SIZE)
    with Pagemap() as pagemap:
        present = [pagemap.present(ram.guest.address + i * PAGE_SIZE) for i in range(PAGES)]
    assert present == [i == 3 for i in range(PAGES)]


@pytest.mark.parametrize("kind", KINDS)
def test_shut_closes_all_of_it_and_reopening_gives_back_what_was_in(make, ram, kind):
    view = make(kind)
    for page in (1, 4):
        fill(ram, page, page)
        view.bring_in(page * PAGE_SIZE, PAGE_SIZE)
    view.shut()
    for page in range(PAGES):
        assert read(ram, page) is None
        address = ram.guest.address + page * PAGE_SIZE
        assert populate_read(address, PAGE_SIZE) == -errno.EINVAL
    view.reopen()
    assert (read(ram, 1), read(ram, 4)) == (b"\1", b"\4")


@pytest.mark.parametrize("page_is_cached", [False, True])
def test_shut_releases_who_sleeps_into_an_error_and_never_into_zeros(make, ram, page_is_cached):
    view = make("waiting")
    if page_is_cached:
        fill(ram, 3, 9)
    sleeper = Sleeper(ram, 3)
    assert sleeper.sleeps()
    view.shut()
    assert sleeper.wakes() < 0
    assert cached(ram) == [page_is_cached and i == 3 for i in range(PAGES)]
    assert ram.bytes[3 * PAGE_SIZE] == (9 if page_is_cached else 0)


def test_after_reopening_absent_pages_are_still_waited_for(make, ram):
    view = make("waiting")
    view.shut()
    view.reopen()
    sleeper = Sleeper(ram, 3)
    assert sleeper.sleeps()
    fill(ram, 3, 5)
    view.bring_in(3 * PAGE_SIZE, PAGE_SIZE)
    assert sleeper.wakes() == 0
    assert read(ram, 3) == b"\5"


def test_protected_keeps_its_holes_over_shut_and_reopen(make, ram):
    view = make("protected")
    for page in range(PAGES):
        fill(ram, page, page + 1)
    for page in (0, 1, 3, 7):
        view.bring_in(page * PAGE_SIZE, PAGE_SIZE)
    view.shut()
    view.bring_in(5 * PAGE_SIZE, PAGE_SIZE)  # while it is shut: for later
    assert read(ram, 5) is None
    view.reopen()
    seen = [read(ram, page) for page in range(PAGES)]
    expected = [bytes([p + 1]) if p in (0, 1, 3, 5, 7) else None for p in range(PAGES)]
    assert seen == expected


def test_a_page_that_is_not_whole_in_the_host_view_is_not_let_in(make, ram):
    """UFFDIO_CONTINUE of a page in no cache: an error, and nothing is mapped."""
    view = make("failing")
    with pytest.raises(Exception, match="UFFDIO_CONTINUE") as caught:
        view.bring_in(0, PAGE_SIZE)
    assert caught.value.errno == errno.EFAULT
    assert cached(ram) == [False] * PAGES
    assert read(ram, 0) is None
