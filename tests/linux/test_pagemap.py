import subprocess
import sys
from mmap import PAGESIZE

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.errors import Unavailable
from guestfault.linux.mapping import Mapping
from guestfault.linux.pagemap import Pagemap, PageState
from guestfault.linux.userfaultfd import Feature, Mode
from guestfault.uapi import mman as uapi


@pytest.fixture
def pagemap():
    with Pagemap() as p:
        yield p


def test_present_follows_the_page(pagemap, ram):
    assert not pagemap.present(ram.page(0))
    assert ram.guest.populate_read(0, PAGESIZE) == 0
    assert pagemap.present(ram.page(0))
    assert pagemap.present(ram.page(1) - 1)
    assert not pagemap.present(ram.page(1))
    ram.guest.discard(0, PAGESIZE)
    assert not pagemap.present(ram.page(0))


def test_in_the_page_cache_is_not_present(pagemap, ram):
    ram.fill(2, 1)
    assert pagemap.present(ram.host.address + 2 * PAGESIZE)
    assert not pagemap.present(ram.page(2))


def test_a_page_without_access_is_present(pagemap, ram):
    assert ram.guest.populate_write(0, PAGESIZE) == 0
    ram.guest.protect(0, PAGESIZE, uapi.PROT_NONE)
    assert pagemap.present(ram.page(0))


def test_state_tells_file_from_anonymous(pagemap, ram):
    with Mapping.anonymous(PAGESIZE) as anonymous:
        assert anonymous.populate_write(0, PAGESIZE) == 0
        assert ram.guest.populate_write(0, PAGESIZE) == 0
        mine, files = pagemap.state(anonymous.address), pagemap.state(ram.page(0))
    assert (mine.present, mine.file, mine.swapped, mine.uffd_wp) == (True, False, False, False)
    assert (files.present, files.file) == (True, True)


def test_uffd_wp_bit(pagemap, open_uffd):
    uffd = open_uffd(Feature.PAGEFAULT_FLAG_WP)
    with Mapping.anonymous(2 * PAGESIZE) as m:
        assert m.populate_write(0, 2 * PAGESIZE) == 0
        uffd.register(m.address, m.size, Mode.WP)
        assert uffd.writeprotect(m.address, PAGESIZE, protect=True).errno == 0
        assert [pagemap.state(m.address + n * PAGESIZE).uffd_wp for n in (0, 1)] == [True, False]


def test_entries_are_the_single_entries(pagemap, ram):
    assert ram.guest.populate_read(PAGESIZE, 2 * PAGESIZE) == 0
    entries = pagemap.entries(ram.page(0), 8)
    assert list(entries) == [pagemap.entry(ram.page(n)) for n in range(8)]
    assert [bool(e & uapi.PM_PRESENT) for e in entries] == [False, True, True] + [False] * 5


def test_nothing_is_mapped_past_the_end_of_the_address_space(pagemap):
    end = 1 << 47
    assert not pagemap.present(end)
    assert pagemap.entry((1 << 64) - PAGESIZE) == 0
    assert list(pagemap.entries(end - PAGESIZE, 3)) == [0, 0, 0]


@given(st.integers(0, 2**64 - 1))
def test_every_entry_decodes(entry):
    state = PageState.of(entry)
    assert state.present == bool(entry >> 63)
    assert state.swapped == bool(entry >> 62 & 1)
    assert state.file == bool(entry >> 61 & 1)
    assert state.uffd_wp == bool(entry >> 57 & 1)
    assert state.soft_dirty == bool(entry >> 55 & 1)


def test_of_another_process():
    # A child that waits for its standard input; the parent may be one of the system's.
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        with Pagemap(child.pid) as pagemap:
            assert pagemap.path == f"/proc/{child.pid}/pagemap"
        child.communicate(b"\n")
    with pytest.raises(Unavailable) as caught:
        Pagemap(0)
    assert caught.value.what == "/proc/0/pagemap"


@given(swap_type=st.integers(0, 31), pfn=st.integers(0, 40), broken=st.integers(0, 40))
def test_a_broken_page_is_told_by_its_number(
    swap_type: int, pfn: int, broken: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """Whatever type this kernel's configuration gives to broken memory, and to no other page."""
    flags = tmp_path_factory.mktemp("proc") / "kpageflags"
    flags.write_bytes(bytes(8 * broken) + (1 << uapi.KPF_HWPOISON).to_bytes(8, "little"))
    with pytest.MonkeyPatch.context() as patch, Pagemap() as pagemap:
        patch.setattr("guestfault.linux.pagemap._KPAGEFLAGS", str(flags))
        patch.setattr(pagemap, "entry", lambda _: uapi.PM_SWAP | pfn << 5 | swap_type)
        state = pagemap.state(0)
    is_marker = swap_type == 31 and bool(pfn & 2)
    assert state.poisoned == (is_marker or (22 <= swap_type <= 30 and pfn == broken))


def test_a_swap_entry_is_not_broken_for_who_may_not_look(pagemap, monkeypatch, tmp_path):
    monkeypatch.setattr("guestfault.linux.pagemap._KPAGEFLAGS", str(tmp_path / "none"))
    monkeypatch.setattr(pagemap, "entry", lambda _: uapi.PM_SWAP | 7 << 5 | 27)
    assert not pagemap.state(0).poisoned
