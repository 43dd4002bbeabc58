"""The memory limit of the control group that this process runs in.

Guest RAM in a memfd is charged to the group of the process that first touches each page.  At the
limit the page fault fails inside ``KVM_RUN``, or the OOM killer ends the VMM; neither names the
group.  Version 2 says ``memory.max``, version 1 ``memory.limit_in_bytes``; the limit that binds is
the least one from the process's own group up to the root.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from guestfault.check.finding import Finding, Status
from guestfault.check.mounts import mount_points
from guestfault.check.units import bytes_text

__all__ = ["probe"]

NAME = "memory cgroup"

# The files of each version: the limit, and what counts against it.
V1 = ("memory.limit_in_bytes", "memory.usage_in_bytes")
V2 = ("memory.max", "memory.current")

# Version 1 says "no limit" with the largest multiple of the page size that a long holds.
NO_LIMIT_V1 = (1 << 63) - 4096


def probe(cgroup: str = "/proc/self/cgroup", mountinfo: str = "/proc/self/mountinfo") -> Finding:
    """Find the least memory limit over this process."""
    limits = list(_limits(Path(cgroup), mountinfo))
    if not limits:
        return Finding(NAME, Status.OK, "no limit")
    limit, file, usage = min(limits)
    detail = f"guest RAM counts against a limit of {bytes_text(limit)}, {bytes_text(usage)} in use"
    return Finding(NAME, Status.LIMITED, detail, f"if guests need more, raise {file}")


def _limits(cgroup: Path, mountinfo: str) -> Iterator[tuple[int, Path, int]]:
    """Each limit in force in bytes, the file that says it, and the bytes in use."""
    try:
        lines = cgroup.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            limit_file, usage_file = V2
            roots = mount_points("cgroup2", mountinfo=mountinfo)
        elif "memory" in controllers.split(","):
            limit_file, usage_file = V1
            roots = mount_points("cgroup", "memory", mountinfo=mountinfo)
        else:
            continue
        for root in roots:
            # In a container the path can be the host's: then only the root is found.
            for group in _up(root, path):
                limit = _number(group / limit_file)
                if limit is not None and limit < NO_LIMIT_V1:
                    yield limit, group / limit_file, _number(group / usage_file) or 0


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
