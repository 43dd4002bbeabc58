"""What ``/proc`` says about permissions: sysctls, and this process's capabilities and seccomp mode.

The kernel answers a refused request with ``EPERM``, whoever refused: a missing capability, a
sysctl, a container's seccomp filter.  To say which one it was, and so what would mend it, takes
these files.
"""

from __future__ import annotations

import os
from pathlib import Path

__all__ = [
    "CAP_SYS_PTRACE",
    "has_capability",
    "mem_available",
    "seccomp_filtered",
    "status",
    "sysctl",
]

CAP_SYS_PTRACE = 19
"""Number of the capability that userfaultfd asks for (``include/uapi/linux/capability.h``)."""


def sysctl(name: str) -> str | None:
    """The value of a sysctl such as ``vm.unprivileged_userfaultfd``.

    ``None`` if this kernel has no such sysctl, or ``/proc`` is not mounted or hides it.
    """
    try:
        return Path("/proc/sys", *name.split(".")).read_text().strip()
    except OSError:
        return None


def mem_available() -> int:
    """Bytes that can be allocated without swapping (``MemAvailable``); all memory if not told."""
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name == "MemAvailable":
                return int(value.split()[0]) << 10
    except (OSError, ValueError, IndexError):
        pass
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def status() -> dict[str, str]:
    """The fields of ``/proc/self/status`` by name; empty where ``/proc`` is not mounted."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return {}
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def has_capability(number: int) -> bool:
    """Whether a capability is in this process's effective set.

    The set is relative to the process's user namespace: root in a container has it here, and the
    kernel may still refuse a request that must be privileged in the *initial* namespace.
    """
    return bool(int(status().get("CapEff", "0"), 16) >> number & 1)


def seccomp_filtered() -> bool:
    """Whether a seccomp filter sees this process's system calls (mode 2, ``seccomp(2)``)."""
    return status().get("Seccomp") == "2"
