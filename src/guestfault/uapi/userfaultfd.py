"""``userfaultfd(2)``: the file descriptor through which a program resolves its own page faults.

A registered range delivers a :class:`uffd_msg` for an access that finds no page (mode MISSING), a
page that is in the page cache but not mapped (MINOR), or a write-protected one (WP).  The thread
that made the access sleeps until an ioctl has filled or unprotected the page and woken it.

The facts come from ``include/uapi/linux/userfaultfd.h``: Linux 6.1 up to
``UFFD_FEATURE_WP_HUGETLBFS_SHMEM`` and ``UFFDIO_CONTINUE``; 6.4 to 6.8 for ``WP_UNPOPULATED``,
``POISON``, ``WP_ASYNC`` and ``MOVE``; 7.3 for read-write protection (``RWP``) and
``UFFDIO_SET_MODE``.  Two names differ from the kernel's, because Python gives them a meaning:
``remap.from_``, and ``SYS_userfaultfd`` (as in the man page) for ``__NR_userfaultfd``.
"""

from __future__ import annotations

from ctypes import Structure, Union, c_int64, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Final

from guestfault.uapi.ioctl_numbers import _IO, _IOR, _IOW, _IOWR

# The system call, and the ioctl of /dev/userfaultfd that stands in for it.
SYS_userfaultfd: Final = 323  # x86-64
UFFD_USER_MODE_ONLY: Final = 1
USERFAULTFD_IOC: Final = 0xAA
USERFAULTFD_IOC_NEW: Final = _IO(USERFAULTFD_IOC, 0x00)

# UFFDIO_API: the handshake.
UFFD_API: Final = 0xAA

UFFD_FEATURE_PAGEFAULT_FLAG_WP: Final = 1 << 0
UFFD_FEATURE_EVENT_FORK: Final = 1 << 1
UFFD_FEATURE_EVENT_REMAP: Final = 1 << 2
UFFD_FEATURE_EVENT_REMOVE: Final = 1 << 3
UFFD_FEATURE_MISSING_HUGETLBFS: Final = 1 << 4
UFFD_FEATURE_MISSING_SHMEM: Final = 1 << 5
UFFD_FEATURE_EVENT_UNMAP: Final = 1 << 6
UFFD_FEATURE_SIGBUS: Final = 1 << 7
UFFD_FEATURE_THREAD_ID: Final = 1 << 8
UFFD_FEATURE_MINOR_HUGETLBFS: Final = 1 << 9
UFFD_FEATURE_MINOR_SHMEM: Final = 1 << 10
UFFD_FEATURE_EXACT_ADDRESS: Final = 1 << 11
UFFD_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
UFFD_FEATURE_WP_UNPOPULATED: Final = 1 << 13
UFFD_FEATURE_POISON: Final = 1 << 14
UFFD_FEATURE_WP_ASYNC: Final = 1 << 15
UFFD_FEATURE_MOVE: Final = 1 << 16
UFFD_FEATURE_RWP: Final = 1 << 17
UFFD_FEATURE_RWP_ASYNC: Final = 1 << 18

# Modes of each ioctl.
UFFDIO_REGISTER_MODE_MISSING: Final = 1 << 0
UFFDIO_REGISTER_MODE_WP: Final = 1 << 1
UFFDIO_REGISTER_MODE_MINOR: Final = 1 << 2
UFFDIO_REGISTER_MODE_RWP: Final = 1 << 3

UFFDIO_COPY_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_COPY_MODE_WP: Final = 1 << 1
UFFDIO_ZEROPAGE_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_WRITEPROTECT_MODE_WP: Final = 1 << 0
UFFDIO_WRITEPROTECT_MODE_DONTWAKE: Final = 1 << 1
UFFDIO_CONTINUE_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_CONTINUE_MODE_WP: Final = 1 << 1
UFFDIO_POISON_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_MOVE_MODE_DONTWAKE: Final = 1 << 0
UFFDIO_MOVE_MODE_ALLOW_SRC_HOLES: Final = 1 << 1
UFFDIO_RWPROTECT_MODE_RWP: Final = 1 << 0
UFFDIO_RWPROTECT_MODE_DONTWAKE: Final = 1 << 1

# What read() delivers.
UFFD_EVENT_PAGEFAULT: Final = 0x12
UFFD_EVENT_FORK: Final = 0x13
UFFD_EVENT_REMAP: Final = 0x14
UFFD_EVENT_REMOVE: Final = 0x15
UFFD_EVENT_UNMAP: Final = 0x16

UFFD_PAGEFAULT_FLAG_WRITE: Final = 1 << 0
UFFD_PAGEFAULT_FLAG_WP: Final = 1 << 1
UFFD_PAGEFAULT_FLAG_MINOR: Final = 1 << 2
UFFD_PAGEFAULT_FLAG_RWP: Final = 1 << 3


class _pagefault_feat(Union):
    _fields_ = [("ptid", c_uint32)]


class _pagefault(Structure):
    _fields_ = [("flags", c_uint64), ("address", c_uint64), ("feat", _pagefault_feat)]


class _fork(Structure):
    _fields_ = [("ufd", c_uint32)]


class _remap(Structure):
    _fields_ = [("from_", c_uint64), ("to", c_uint64), ("len", c_uint64)]


class _remove(Structure):
    _fields_ = [("start", c_uint64), ("end", c_uint64)]


class _reserved(Structure):
    _fields_ = [("reserved1", c_uint64), ("reserved2", c_uint64), ("reserved3", c_uint64)]


class _arg(Union):
    _fields_ = [
        ("pagefault", _pagefault),
        ("fork", _fork),
        ("remap", _remap),
        ("remove", _remove),
        ("reserved", _reserved),
    ]


class uffd_msg(Structure):
    # Declared packed in the header, to no effect: every field is aligned as it stands.
    _fields_ = [
        ("event", c_uint8),
        ("reserved1", c_uint8),
        ("reserved2", c_uint16),
        ("reserved3", c_uint32),
        ("arg", _arg),
    ]


class uffdio_api(Structure):
    _fields_ = [("api", c_uint64), ("features", c_uint64), ("ioctls", c_uint64)]


class uffdio_range(Structure):
    _fields_ = [("start", c_uint64), ("len", c_uint64)]


class uffdio_register(Structure):
    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("ioctls", c_uint64)]


class uffdio_copy(Structure):
    _fields_ = [
        ("dst", c_uint64),
        ("src", c_uint64),
        ("len", c_uint64),
        ("mode", c_uint64),
        ("copy", c_int64),
    ]


class uffdio_zeropage(Structure):
    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("zeropage", c_int64)]


class uffdio_writeprotect(Structure):
    _fields_ = [("range", uffdio_range), ("mode", c_uint64)]


class uffdio_continue(Structure):
    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("mapped", c_int64)]


class uffdio_poison(Structure):
    _fields_ = [("range", uffdio_range), ("mode", c_uint64), ("updated", c_int64)]


class uffdio_move(Structure):
    _fields_ = [
        ("dst", c_uint64),
        ("src", c_uint64),
        ("len", c_uint64),
        ("mode", c_uint64),
        ("move", c_int64),
    ]


class uffdio_rwprotect(Structure):
    _fields_ = [("range", uffdio_range), ("mode", c_uint64)]


class uffdio_set_mode(Structure):
    _fields_ = [("enable", c_uint64), ("disable", c_uint64)]


# Ordinals: the bit of each ioctl in uffdio_api.ioctls and uffdio_register.ioctls.
_UFFDIO_REGISTER: Final = 0x00
_UFFDIO_UNREGISTER: Final = 0x01
_UFFDIO_WAKE: Final = 0x02
_UFFDIO_COPY: Final = 0x03
_UFFDIO_ZEROPAGE: Final = 0x04
_UFFDIO_MOVE: Final = 0x05
_UFFDIO_WRITEPROTECT: Final = 0x06
_UFFDIO_CONTINUE: Final = 0x07
_UFFDIO_POISON: Final = 0x08
_UFFDIO_RWPROTECT: Final = 0x09
_UFFDIO_SET_MODE: Final = 0x0A
_UFFDIO_API: Final = 0x3F

UFFDIO: Final = 0xAA
UFFDIO_API: Final = _IOWR(UFFDIO, _UFFDIO_API, uffdio_api)
UFFDIO_REGISTER: Final = _IOWR(UFFDIO, _UFFDIO_REGISTER, uffdio_register)
# _IOR although the kernel reads the range: a slip of the header that became the interface.
UFFDIO_UNREGISTER: Final = _IOR(UFFDIO, _UFFDIO_UNREGISTER, uffdio_range)
UFFDIO_WAKE: Final = _IOR(UFFDIO, _UFFDIO_WAKE, uffdio_range)
UFFDIO_COPY: Final = _IOWR(UFFDIO, _UFFDIO_COPY, uffdio_copy)
UFFDIO_ZEROPAGE: Final = _IOWR(UFFDIO, _UFFDIO_ZEROPAGE, uffdio_zeropage)
UFFDIO_WRITEPROTECT: Final = _IOWR(UFFDIO, _UFFDIO_WRITEPROTECT, uffdio_writeprotect)
UFFDIO_CONTINUE: Final = _IOWR(UFFDIO, _UFFDIO_CONTINUE, uffdio_continue)
UFFDIO_POISON: Final = _IOWR(UFFDIO, _UFFDIO_POISON, uffdio_poison)
UFFDIO_MOVE: Final = _IOWR(UFFDIO, _UFFDIO_MOVE, uffdio_move)
UFFDIO_RWPROTECT: Final = _IOWR(UFFDIO, _UFFDIO_RWPROTECT, uffdio_rwprotect)
UFFDIO_SET_MODE: Final = _IOW(UFFDIO, _UFFDIO_SET_MODE, uffdio_set_mode)
