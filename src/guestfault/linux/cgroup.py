"""The limits of the control groups that a process runs in, and how much room is left below them.

Guest memory is charged to the group of the process that first touches each page.  At the limit the
page fault fails inside ``KVM_RUN``, or the OOM killer ends the VMM; neither names the group.

Version 2 says ``memory.max`` and ``memory.current``, version 1 ``memory.limit_in_bytes`` and
``memory.usage_in_bytes``; huge pages have a controller of their own, with one pair of files for
each page size (``hugetlb.2MB.max``).  A group is held to the limits of every group above it too, so
all of them are here, in whatever order they were found: the least :attr:`Limit.room` binds.
(``Documentation/admin-guide/cgroup-v2.rst``, ``cgroup-v1/memory.rst``, ``cgroup-v1/hugetlb.rst``.)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from guestfault.linux.mounts import mount_points

__all__ = ["Limit", "hugetlb_limits", "memory_limits"]

# Version 1 says "no limit" with the largest multiple of the page size that a long holds, and the
# hugetlb controller with the largest multiple of its own page size.
_NO_LIMIT_V1 = (1 << 63) - (2 << 30)


@dataclass(frozen=True, slots=True)
class Limit:
    """A limit in force: ``limit`` bytes, said by ``file``, of which ``usage`` bytes are used."""

    limit: int
    usage: int
    file: Path

    @property
    def room(self) -> int:
        """Bytes that may still be charged; 0 for a group that is past a limit lowered under it."""
        return max(0, self.limit - self.usage)


def memory_limits(
    cgroup: str = "/proc/self/cgroup", mountinfo: str = "/proc/self/mountinfo"
) -> tuple[Limit, ...]:
    """The memory limits over the process whose ``/proc/PID/cgroup`` this is; empty for none."""
    v2 = ("memory.max", "memory.current")
    v1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
    return tuple(_limits("memory", v1, v2, Path(cgroup), mountinfo))


def hugetlb_limits(
    page_size: int,
    cgroup: str = "/proc/self/cgroup",
    mountinfo: str = "/proc/self/mountinfo",
) -> tuple[Limit, ...]:
    """The limits on huge pages of ``page_size`` bytes in use; reservations are limited apart."""
    size = f"{page_size >> 30}GB" if page_size >= 1 << 30 else f"{page_size >> 20}MB"
    v2 = (f"hugetlb.{size}.max", f"hugetlb.{size}.current")
    v1 = (f"hugetlb.{size}.limit_in_bytes", f"hugetlb.{size}.usage_in_bytes")
    return tuple(_limits("hugetlb", v1, v2, Path(cgroup), mountinfo))


def _limits(
    controller: str, v1: tuple[str, str], v2: tuple[str, str], cgroup: Path, mountinfo: str
) -> Iterator[Limit]:
    try:
        lines = cgroup.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limit_file, usage_file = v2
            roots = mount_points("cgroup2", mountinfo=mountinfo)
        elif controller in controllers.split(","):
            limit_file, usage_file = v1
            roots = mount_points("cgroup", controller, mountinfo=mountinfo)
        else:
            continue
        for root in roots:
            # In a container the path can be the host's: then only the root is found.
            for group in _up(root, path):
                limit = _number(group / limit_file)
                if limit is not None and limit < _NO_LIMIT_V1:
                    yield Limit(limit, _number(group / usage_file) or 0, group / limit_file)


def _up(root: Path, path: str) -> Iterator[Path]:
    """The group's directory and those above it, up to the root's."""
    relative = Path(path.lstrip("/"))
    for part in (relative, *relative.parents):
        yield root / part


def _number(path: Path) -> int | None:
    """The number in a file; ``None`` for no file, or for the word ``max``."""
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None
