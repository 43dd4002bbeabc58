import os
from itertools import pairwise
from mmap import PAGESIZE

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.errors import KernelError
from guestfault.linux import vma
from guestfault.linux.mapping import Mapping
from guestfault.linux.userfaultfd import Mode
from guestfault.linux.vma import Vma
from guestfault.uapi import mman as uapi

MAPS = """\
55d0a2c00000-55d0a2c01000 r-xp 00001000 fd:01 1835034                    /usr/bin/my program
55d0a3b1e000-55d0a3b3f000 rw-p 00000000 00:00 0                          [heap]
7f1e40000000-7f1e60000000 rw-s 10000000 00:01 2051                       /memfd:guest-ram (deleted)
7f1e7c000000-7f1e7c021000 ---p 00000000 00:00 0 
7f1e80a00000-7f1e80a01000 r--s 00000000 08:10 77                         /tmp/new\\012line
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""  # noqa: W291 the kernel writes that blank

SMAPS = """\
7f1e40000000-7f1e40002000 rw-s 00000000 00:01 2051                       /memfd:guest-ram (deleted)
Size:                  8 kB
KernelPageSize:        4 kB
Rss:                   4 kB
THPeligible:           0
VmFlags: rd wr sh mr mw me ms um ui nh 
7ffd1c5f0000-7ffd1c611000 rw-p 00000000 00:00 0                          [stack]
Size:                132 kB
VmFlags: rd wr mr mw me gd ac 
"""  # noqa: W291


def test_parse_captured_maps():
    program, heap, ram, guard, odd, vsyscall = vma.parse(MAPS)
    assert program == Vma(
        start=0x55D0A2C00000,
        end=0x55D0A2C01000,
        read=True,
        write=False,
        execute=True,
        shared=False,
        offset=0x1000,
        dev=(0xFD, 1),
        inode=1835034,
        path="/usr/bin/my program",
        deleted=False,
    )
    assert (heap.path, heap.inode) == ("[heap]", 0)
    assert (ram.path, ram.deleted, ram.shared) == ("/memfd:guest-ram", True, True)
    assert ram.offset_of(ram.start + 0x123) == 0x10000123
    assert (guard.path, guard.read, guard.write, guard.execute) == ("", False, False, False)
    assert (odd.path, odd.dev) == ("/tmp/new\nline", (8, 16))
    assert vsyscall.end == 0xFFFFFFFFFF601000
    assert all(v.flags is None for v in (program, heap, ram))


def test_parse_captured_smaps():
    ram, stack = vma.parse(SMAPS)
    assert ram.flags == {"rd", "wr", "sh", "mr", "mw", "me", "ms", "um", "ui", "nh"}
    assert stack.flags is not None
    assert "gd" in stack.flags
    assert ram.size == 2 * PAGESIZE
    assert (ram.page_size, stack.page_size) == (4096, None)


def test_parse_nothing():
    assert list(vma.parse("")) == []


def test_contains_is_half_open():
    ram = next(vma.parse(SMAPS))
    assert ram.start in ram
    assert ram.end - 1 in ram
    assert ram.end not in ram
    assert ram.start - 1 not in ram


_paths = st.text(st.characters(codec="utf-8", exclude_characters="\0\n")).map(lambda s: "/" + s)


@given(
    start=st.integers(0, 2**51),
    npages=st.integers(1, 2**20),
    perms=st.tuples(*(st.sampled_from(pair) for pair in ("r-", "w-", "x-", "ps"))).map("".join),
    inode=st.integers(0, 2**63),
    path=_paths.filter(lambda p: not p.endswith(" (deleted)") and r"\012" not in p),
    deleted=st.booleans(),
)
def test_any_line_of_the_kernels_format_comes_back(start, npages, perms, inode, path, deleted):
    start *= PAGESIZE
    end = start + npages * PAGESIZE
    line = f"{start:08x}-{end:08x} {perms} 00002000 fd:03 {inode} ".ljust(73)
    (found,) = vma.parse(line + path + (" (deleted)" if deleted else "") + "\n")
    assert (found.start, found.end, found.inode) == (start, end, inode)
    assert (found.path, found.deleted) == (path, deleted)
    mine = zip("rwxs", (found.read, found.write, found.execute, found.shared), strict=True)
    assert all((letter in perms) == value for letter, value in mine)


def test_find_in_ourselves(ram):
    ram.guest.protect(PAGESIZE, PAGESIZE, uapi.PROT_READ)
    found = vma.find(ram.page(1) + 17)
    assert found is not None
    assert (found.start, found.end) == (ram.page(1), ram.page(2))
    assert (found.read, found.write, found.shared, found.deleted) == (True, False, True, True)
    assert (found.path, found.offset) == ("/memfd:test-ram", PAGESIZE)
    assert found.inode == os.fstat(ram.file.fd).st_ino


def test_what_is_not_mapped_is_not_found():
    m = Mapping.anonymous(PAGESIZE, prot=uapi.PROT_NONE, shared=True)
    assert vma.find(m.address) is not None
    m.close()
    found = vma.find(m.address)
    assert found is None or not found.shared  # the place may be taken again by now
    assert vma.find(0) is None


def test_the_whole_list_is_sorted_and_flags_come_when_asked():
    plain = vma.vmas()
    assert all(a.end <= b.start for a, b in pairwise(plain))
    assert {v.flags for v in plain} == {None}
    flagged = vma.vmas(os.getpid(), flags=True)
    assert all(v.flags for v in flagged)


def test_registered_memory_shows_in_the_flags(ram, open_uffd):
    open_uffd().register(ram.guest.address, ram.guest.size, Mode.MISSING | Mode.MINOR)
    guest, host = (vma.find(m.address, flags=True) for m in (ram.guest, ram.host))
    assert guest is not None
    assert host is not None
    assert {"um", "ui"} <= guest.flags
    assert not {"um", "ui"} & host.flags


def test_no_such_process():
    with pytest.raises(KernelError, match=r"read: ENOENT .*: /proc/0/maps"):
        vma.vmas(0)
