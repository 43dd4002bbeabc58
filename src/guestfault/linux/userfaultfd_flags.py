"""The names of a userfaultfd's bits: features, register modes, and the ioctls that a range can do.

The numbers are those of :mod:`guestfault.uapi.userfaultfd`.  As :class:`enum.IntFlag` they print by
name and are still the integers that the kernel takes.  Read-write protection (RWP, Linux 7.3) has
no wrapper here, and so no name.
"""

from __future__ import annotations

from enum import IntFlag

from guestfault.uapi import userfaultfd as uapi

__all__ = ["Feature", "Ioctl", "Mode", "mend"]


class Feature(IntFlag):
    """``UFFD_FEATURE_*``.

    ``EVENT_*``, ``SIGBUS``, ``THREAD_ID``, ``EXACT_ADDRESS``, ``WP_UNPOPULATED`` and ``WP_ASYNC``
    change what the kernel does if they are asked for.  The others only tell what it can do.
    """

    PAGEFAULT_FLAG_WP = uapi.UFFD_FEATURE_PAGEFAULT_FLAG_WP
    EVENT_FORK = uapi.UFFD_FEATURE_EVENT_FORK
    EVENT_REMAP = uapi.UFFD_FEATURE_EVENT_REMAP
    EVENT_REMOVE = uapi.UFFD_FEATURE_EVENT_REMOVE
    MISSING_HUGETLBFS = uapi.UFFD_FEATURE_MISSING_HUGETLBFS
    MISSING_SHMEM = uapi.UFFD_FEATURE_MISSING_SHMEM
    EVENT_UNMAP = uapi.UFFD_FEATURE_EVENT_UNMAP
    SIGBUS = uapi.UFFD_FEATURE_SIGBUS
    THREAD_ID = uapi.UFFD_FEATURE_THREAD_ID
    MINOR_HUGETLBFS = uapi.UFFD_FEATURE_MINOR_HUGETLBFS
    MINOR_SHMEM = uapi.UFFD_FEATURE_MINOR_SHMEM
    EXACT_ADDRESS = uapi.UFFD_FEATURE_EXACT_ADDRESS
    WP_HUGETLBFS_SHMEM = uapi.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    WP_UNPOPULATED = uapi.UFFD_FEATURE_WP_UNPOPULATED
    POISON = uapi.UFFD_FEATURE_POISON
    WP_ASYNC = uapi.UFFD_FEATURE_WP_ASYNC
    MOVE = uapi.UFFD_FEATURE_MOVE


class Mode(IntFlag):
    """``UFFDIO_REGISTER_MODE_*``: which accesses to a registered range are faults for us."""

    MISSING = uapi.UFFDIO_REGISTER_MODE_MISSING
    WP = uapi.UFFDIO_REGISTER_MODE_WP
    MINOR = uapi.UFFDIO_REGISTER_MODE_MINOR


class Ioctl(IntFlag):
    """The ioctls that a descriptor, or a registered range, can do: bits ``_UFFDIO_*``."""

    REGISTER = 1 << uapi._UFFDIO_REGISTER
    UNREGISTER = 1 << uapi._UFFDIO_UNREGISTER
    WAKE = 1 << uapi._UFFDIO_WAKE
    COPY = 1 << uapi._UFFDIO_COPY
    ZEROPAGE = 1 << uapi._UFFDIO_ZEROPAGE
    MOVE = 1 << uapi._UFFDIO_MOVE
    WRITEPROTECT = 1 << uapi._UFFDIO_WRITEPROTECT
    CONTINUE = 1 << uapi._UFFDIO_CONTINUE
    POISON = 1 << uapi._UFFDIO_POISON
    API = 1 << uapi._UFFDIO_API


# Releases that brought them, for an error to name; what is not here came with 4.11.
_SINCE = {
    Feature.PAGEFAULT_FLAG_WP: (5, 7),
    Feature.SIGBUS: (4, 14),
    Feature.THREAD_ID: (4, 14),
    Feature.MINOR_HUGETLBFS: (5, 13),
    Feature.MINOR_SHMEM: (5, 14),
    Feature.EXACT_ADDRESS: (5, 18),
    Feature.WP_HUGETLBFS_SHMEM: (5, 19),
    Feature.WP_UNPOPULATED: (6, 4),
    Feature.POISON: (6, 6),
    Feature.WP_ASYNC: (6, 7),
    Feature.MOVE: (6, 8),
}


def mend(features: Feature) -> str:
    """What to do about a kernel without ``features``: the release to use."""
    if features & ~sum(Feature):
        return "use a newer kernel"
    major, minor = max((_SINCE.get(feature, (4, 11)) for feature in features), default=(4, 11))
    return f"use Linux {major}.{minor} or later"
