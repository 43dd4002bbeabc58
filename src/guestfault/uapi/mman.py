"""Numbers of ``mmap(2)``, ``madvise(2)``, ``memfd_create(2)``, ``fallocate(2)`` and the pagemap.

Python's :mod:`mmap` and :mod:`os` have some of these, more or fewer by the headers Python was built
with.  The facts come from ``include/uapi/asm-generic/mman-common.h``, ``linux/mman.h``,
``linux/memfd.h`` and ``linux/falloc.h`` as x86-64 has them: Linux 6.1, ``MFD_EXEC`` and
``MFD_NOEXEC_SEAL`` 6.3, ``MADV_GUARD_*`` 6.13.  No header exports the bits of a pagemap entry; they
are from ``fs/proc/task_mmu.c``.
"""

from __future__ import annotations

from typing import Final

# mmap, mprotect
PROT_NONE: Final = 0x0
PROT_READ: Final = 0x1
PROT_WRITE: Final = 0x2
PROT_EXEC: Final = 0x4

MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_SHARED_VALIDATE: Final = 0x03
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_LOCKED: Final = 0x2000
MAP_NORESERVE: Final = 0x4000
MAP_POPULATE: Final = 0x8000
MAP_NONBLOCK: Final = 0x10000
MAP_STACK: Final = 0x20000
MAP_HUGETLB: Final = 0x40000
MAP_FIXED_NOREPLACE: Final = 0x100000
MAP_HUGE_SHIFT: Final = 26
MAP_HUGE_2MB: Final = 21 << MAP_HUGE_SHIFT
MAP_HUGE_1GB: Final = 30 << MAP_HUGE_SHIFT

# mremap
MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2
MREMAP_DONTUNMAP: Final = 4

# madvise
MADV_NORMAL: Final = 0
MADV_RANDOM: Final = 1
MADV_SEQUENTIAL: Final = 2
MADV_WILLNEED: Final = 3
MADV_DONTNEED: Final = 4
MADV_FREE: Final = 8
MADV_REMOVE: Final = 9
MADV_DONTFORK: Final = 10
MADV_DOFORK: Final = 11
MADV_MERGEABLE: Final = 12
MADV_UNMERGEABLE: Final = 13
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15
MADV_DONTDUMP: Final = 16
MADV_DODUMP: Final = 17
MADV_WIPEONFORK: Final = 18
MADV_KEEPONFORK: Final = 19
MADV_COLD: Final = 20
MADV_PAGEOUT: Final = 21
MADV_POPULATE_READ: Final = 22
MADV_POPULATE_WRITE: Final = 23
MADV_DONTNEED_LOCKED: Final = 24
MADV_COLLAPSE: Final = 25
MADV_HWPOISON: Final = 100
MADV_SOFT_OFFLINE: Final = 101
MADV_GUARD_INSTALL: Final = 102
MADV_GUARD_REMOVE: Final = 103

# memfd_create
MFD_CLOEXEC: Final = 0x0001
MFD_ALLOW_SEALING: Final = 0x0002
MFD_HUGETLB: Final = 0x0004
MFD_NOEXEC_SEAL: Final = 0x0008
MFD_EXEC: Final = 0x0010
MFD_HUGE_SHIFT: Final = 26
MFD_HUGE_2MB: Final = 21 << MFD_HUGE_SHIFT
MFD_HUGE_1GB: Final = 30 << MFD_HUGE_SHIFT

# fallocate
FALLOC_FL_KEEP_SIZE: Final = 0x01
FALLOC_FL_PUNCH_HOLE: Final = 0x02
FALLOC_FL_ZERO_RANGE: Final = 0x10

# An entry of /proc/pid/pagemap: 64 bits per page.  The pfn is 0 without CAP_SYS_ADMIN.
PM_PFRAME_BITS: Final = 55
PM_PFRAME_MASK: Final = (1 << PM_PFRAME_BITS) - 1
PM_SOFT_DIRTY: Final = 1 << 55
PM_MMAP_EXCLUSIVE: Final = 1 << 56
PM_UFFD_WP: Final = 1 << 57
PM_GUARD_REGION: Final = 1 << 58  # 6.15
PM_FILE: Final = 1 << 61
PM_SWAP: Final = 1 << 62
PM_PRESENT: Final = 1 << 63

# The number of a bit in /proc/kpageflags, which has 64 of them per physical page.
KPF_HWPOISON: Final = 19
