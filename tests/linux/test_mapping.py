import ctypes
import errno
import os
from mmap import PAGESIZE

import pytest

from guestfault.errors import KernelError
from guestfault.linux import mapping, mmu_notifier, process_memory, vma
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.linux.pagemap import Pagemap
from guestfault.uapi import mman as uapi

pytestmark = pytest.mark.timeout(20)


def test_two_views_of_one_file(ram):
    ram.host.view()[PAGESIZE : PAGESIZE + 5] = b"hello"
    assert process_memory.read(ram.page(1), 5) == b"hello"
    assert process_memory.write(ram.page(1), b"H")
    assert bytes(ram.host.view()[PAGESIZE : PAGESIZE + 5]) == b"Hello"
    assert ram.host.address != ram.guest.address


def test_part_of_a_file_and_copy_on_write(ram):
    ram.fill(3, 9)
    part = Mapping.from_memfd(ram.file, offset=3 * PAGESIZE, size=PAGESIZE, shared=False)
    with part:
        assert (part.size, part.offset) == (PAGESIZE, 3 * PAGESIZE)
        part.view()[0] = 1
        assert ram.host.view()[3 * PAGESIZE] == 9
    with Mapping.from_memfd(ram.file, offset=6 * PAGESIZE) as rest:
        assert rest.size == 2 * PAGESIZE


@pytest.mark.parametrize("shared", [False, True])
def test_anonymous_memory_is_as_asked_for(shared):
    with Mapping.anonymous(4 * PAGESIZE, prot=uapi.PROT_READ, shared=shared) as m:
        found = vma.find(m.address, flags=True)
        assert found is not None
        assert found.flags is not None
        assert (found.read, found.write, found.execute, found.shared) == (
            True,
            False,
            False,
            shared,
        )
        assert "nr" in found.flags  # MAP_NORESERVE
        assert process_memory.read(m.address, 1) == b"\0"
        assert not process_memory.write(m.address, b"x")


def test_protect(ram):
    ram.fill(0, 5)
    ram.guest.protect(0, PAGESIZE, uapi.PROT_READ)
    assert process_memory.read(ram.page(0), 1) == b"\x05"
    assert not process_memory.write(ram.page(0), b"x")
    ram.guest.protect(0, PAGESIZE, uapi.PROT_NONE)
    assert process_memory.read(ram.page(0), 1) is None
    assert process_memory.write(ram.page(1), b"x")


def test_discard_keeps_the_content_of_a_shared_file_only(ram):
    with Pagemap() as pagemap, Mapping.anonymous(PAGESIZE) as private:
        private.view()[0] = 1
        private.discard(0, PAGESIZE)
        assert not pagemap.present(private.address)
        assert process_memory.read(private.address, 1) == b"\0"
        assert process_memory.write(ram.page(0), b"x")
        assert pagemap.present(ram.page(0))
        ram.guest.discard(0, PAGESIZE)
        assert not pagemap.present(ram.page(0))
        assert ram.host.view()[0] == ord("x")


def test_populate_makes_pages_present_and_leaves_the_content(ram):
    ram.fill(0, 3)
    with Pagemap() as pagemap:
        for populate in (ram.guest.populate_read, ram.guest.populate_write):
            ram.guest.discard(0, ram.guest.size)
            assert populate(0, 2 * PAGESIZE) == 0
            assert [pagemap.present(ram.page(n)) for n in range(3)] == [True, True, False]
    assert process_memory.read(ram.page(0), 1) == b"\x03"


def test_populate_fails_with_the_errno_of_the_cause(ram):
    ram.guest.protect(0, PAGESIZE, uapi.PROT_NONE)
    ram.guest.protect(PAGESIZE, PAGESIZE, uapi.PROT_READ)
    assert ram.guest.populate_read(0, PAGESIZE) == -errno.EINVAL
    assert ram.guest.populate_read(PAGESIZE, PAGESIZE) == 0
    assert ram.guest.populate_write(PAGESIZE, PAGESIZE) == -errno.EINVAL
    ram.file.truncate(7 * PAGESIZE)
    assert ram.guest.populate_read(7 * PAGESIZE, PAGESIZE) == -errno.EFAULT
    assert mapping.populate_read(0, PAGESIZE) == -errno.ENOMEM
    assert mapping.populate_write(1 << 63, PAGESIZE) < 0


def test_populate_on_an_old_kernel_is_unavailable_and_not_einval(child):
    """Linux 5.13, as far as madvise goes: a seccomp filter that does not know the advice."""
    sys_madvise = 28
    out = child(
        "from guestfault.linux.mapping import Mapping",
        "from guestfault.errors import Unavailable\n"
        "page = Mapping.anonymous(4096)\n"
        "page.discard(0, 4096)\n"
        "for populate in page.populate_read, page.populate_write:\n"
        "    try: populate(0, 4096)\n"
        "    except Unavailable as e: print(e)\n",
        refuse=(
            (sys_madvise, uapi.MADV_POPULATE_READ, errno.EINVAL),
            (sys_madvise, uapi.MADV_POPULATE_WRITE, errno.EINVAL),
        ),
    )
    assert (
        out.splitlines()
        == ["madvise(MADV_POPULATE_READ): this kernel does not know it; use Linux 5.14 or later"]
        * 2
    )


def test_no_hugepage_is_set_on_the_vma():
    with Memfd("thp", PAGESIZE) as file, Mapping.from_memfd(file) as m:
        m.no_hugepage()
        found = vma.find(m.address, flags=True)
        assert found is not None
        assert found.flags is not None
        assert "nh" in found.flags


def test_ranges_outside_and_closed_mappings_are_refused(ram):
    for offset, size in [(-PAGESIZE, PAGESIZE), (0, 9 * PAGESIZE), (8 * PAGESIZE, 1), (0, -1)]:
        with pytest.raises(ValueError, match="not inside a mapping of 0x8000 bytes"):
            ram.guest.discard(offset, size)
    ram.guest.close()
    for act in (lambda: ram.guest.discard(0, PAGESIZE), ram.guest.view):
        with pytest.raises(ValueError, match="closed"):
            act()


def test_refusals_are_kernel_errors(ram):
    for offset, size in [(1, PAGESIZE), (0, 0)]:
        with pytest.raises(KernelError) as caught:
            Mapping.from_memfd(ram.file, offset=offset, size=size)
        assert (caught.value.call, caught.value.errno) == ("mmap", errno.EINVAL)
    with pytest.raises(KernelError) as caught:
        ram.guest.protect(1, PAGESIZE, uapi.PROT_READ)
    assert (caught.value.call, caught.value.errno) == ("mprotect", errno.EINVAL)
    assert ram.file.mapped == [ram.host, ram.guest]


def test_close_unmaps_and_kills_the_view():
    m = Mapping.anonymous(PAGESIZE)
    view = m.view()
    assert view is m.view()
    assert (len(view), view.format, view.readonly) == (PAGESIZE, "B", False)
    for export in (lambda: m.view()[8:16], lambda: (ctypes.c_char * 8).from_buffer(m.view())):
        alive = export()
        with pytest.raises(BufferError, match="still in use through its view"):
            m.close()
        assert process_memory.read(m.address, 1) == b"\0"
        del alive
    m.close()
    assert process_memory.read(m.address, 1) is None
    with pytest.raises(ValueError, match="released"):
        view[0]
    m.close()


def test_the_chain_hears_before_and_after_each_change(ram):
    """At the start the page is still what it was; at the end it is what it became."""
    pagemap = Pagemap()
    heard = []

    class Witness:
        def invalidate_range_start(self, start, end):
            heard.append((start, end, pagemap.present(start), process_memory.write(start, b"x")))

        def invalidate_range_end(self, start, end):
            heard.append((start, end, pagemap.present(start)))

    assert ram.guest.populate_write(0, PAGESIZE) == 0
    page = (ram.page(0), ram.page(1))
    witness = Witness()
    mmu_notifier.register(witness)
    try:
        ram.guest.discard(0, PAGESIZE)
        assert heard == [(*page, True, True), (*page, False)]
        heard.clear()
        assert ram.guest.populate_write(0, PAGESIZE) == 0
        assert heard == []
        ram.guest.protect(0, PAGESIZE, uapi.PROT_READ)
        assert heard == [(*page, True, True), (*page, True)]
        heard.clear()
        ram.guest.close()
        whole = (ram.guest.address, ram.guest.end)
        assert heard == [(*whole, True, False), (*whole, False)]
    finally:
        mmu_notifier.unregister(witness)
        pagemap.close()


def test_a_part_is_unmapped_and_mapped_again_with_its_content() -> None:
    with Memfd("test", 3 * PAGESIZE) as memfd, Mapping.from_memfd(memfd) as mapping:
        os.pwrite(memfd.fd, b"here", PAGESIZE)
        mapping.unmap(PAGESIZE, PAGESIZE)
        assert mapping.populate_read(PAGESIZE, PAGESIZE) == -errno.ENOMEM
        mapping.map_again(PAGESIZE, PAGESIZE)
        assert bytes(mapping.view()[PAGESIZE : PAGESIZE + 4]) == b"here"


def test_what_is_mapped_is_not_mapped_over() -> None:
    with Mapping.anonymous(PAGESIZE) as mapping, pytest.raises(KernelError, match="EEXIST"):
        mapping.map_again(0, PAGESIZE)


def test_a_file_that_is_open_already_is_mapped() -> None:
    fd = os.memfd_create("test")
    os.ftruncate(fd, PAGESIZE)
    with Memfd.adopt(fd, "test", PAGESIZE) as memfd, Mapping.from_memfd(memfd) as mapping:
        os.pwrite(fd, b"x", 0)
        assert mapping.view()[0] == ord("x")
