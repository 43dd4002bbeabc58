"""The memory limit of the control group that this process runs in.

Guest RAM in a memfd is charged to the group of the process that first touches each page.  At the
limit the page fault fails inside ``KVM_RUN``, or the OOM killer ends the VMM; neither names the
group.  The limit that binds is the least one from the process's own group up to the root
(:mod:`guestfault.linux.cgroup`).
"""

from __future__ import annotations

from guestfault.check.finding import Finding, Status
from guestfault.linux.cgroup import memory_limits
from guestfault.linux.units import bytes_text

__all__ = ["probe"]

NAME = "memory cgroup"


def probe(cgroup: str = "/proc/self/cgroup", mountinfo: str = "/proc/self/mountinfo") -> Finding:
    """Find the least memory limit over this process."""
    limits = memory_limits(cgroup, mountinfo)
    if not limits:
        return Finding(NAME, Status.OK, "no limit")
    least = min(limits, key=lambda limit: limit.limit)
    detail = (
        f"guest RAM counts against a limit of {bytes_text(least.limit)}, "
        f"{bytes_text(least.usage)} in use"
    )
    return Finding(NAME, Status.LIMITED, detail, f"if guests need more, raise {least.file}")
