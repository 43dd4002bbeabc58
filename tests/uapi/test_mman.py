"""The bits of a pagemap entry, which no header has, as the running kernel sets them."""

from __future__ import annotations

import mmap
import os
from ctypes import addressof, c_char

import pytest

from guestfault.uapi import mman

SHARED = mman.MAP_SHARED | mman.MAP_ANONYMOUS
PRIVATE = mman.MAP_PRIVATE | mman.MAP_ANONYMOUS


def pagemap_entry(mapping: mmap.mmap) -> int:
    page = addressof(c_char.from_buffer(mapping)) // mmap.PAGESIZE
    fd = os.open("/proc/self/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    try:
        return int.from_bytes(os.pread(fd, 8, page * 8), "little")
    finally:
        os.close(fd)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (PRIVATE, mman.PM_PRESENT | mman.PM_MMAP_EXCLUSIVE),
        (SHARED, mman.PM_PRESENT | mman.PM_FILE | mman.PM_MMAP_EXCLUSIVE),
    ],
    ids=["private", "shared"],
)
def test_a_populated_page(flags: int, expected: int) -> None:
    with mmap.mmap(-1, mmap.PAGESIZE, flags=flags) as mapping:
        assert pagemap_entry(mapping) & ~mman.PM_SOFT_DIRTY == 0
        mapping.madvise(mman.MADV_POPULATE_WRITE)
        entry = pagemap_entry(mapping)
        assert entry & ~mman.PM_PFRAME_MASK & ~mman.PM_SOFT_DIRTY == expected
        if os.geteuid() == 0:
            assert entry & mman.PM_PFRAME_MASK
        mapping.madvise(mman.MADV_DONTNEED)
        assert not pagemap_entry(mapping) & mman.PM_PRESENT
