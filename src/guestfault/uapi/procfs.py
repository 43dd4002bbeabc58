"""``PROCMAP_QUERY`` of ``/proc/PID/maps``: one mapping asked for by address (Linux 6.11).

The facts come from ``include/uapi/linux/fs.h``.
"""

from __future__ import annotations

from ctypes import Structure, c_uint32, c_uint64
from typing import Final

from guestfault.uapi.ioctl_numbers import _IOWR

PROCMAP_QUERY_VMA_READABLE: Final = 0x01
PROCMAP_QUERY_VMA_WRITABLE: Final = 0x02
PROCMAP_QUERY_VMA_EXECUTABLE: Final = 0x04
PROCMAP_QUERY_VMA_SHARED: Final = 0x08
PROCMAP_QUERY_COVERING_OR_NEXT_VMA: Final = 0x10
PROCMAP_QUERY_FILE_BACKED_VMA: Final = 0x20


class procmap_query(Structure):
    _fields_ = [
        ("size", c_uint64),
        ("query_flags", c_uint64),
        ("query_addr", c_uint64),
        ("vma_start", c_uint64),
        ("vma_end", c_uint64),
        ("vma_flags", c_uint64),
        ("vma_page_size", c_uint64),
        ("vma_offset", c_uint64),
        ("inode", c_uint64),
        ("dev_major", c_uint32),
        ("dev_minor", c_uint32),
        ("vma_name_size", c_uint32),
        ("build_id_size", c_uint32),
        ("vma_name_addr", c_uint64),
        ("build_id_addr", c_uint64),
    ]


PROCMAP_QUERY: Final = _IOWR(ord("f"), 17, procmap_query)
