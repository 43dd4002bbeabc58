"""Where a type of file system is mounted: ``/proc/self/mountinfo`` (``proc_pid_mountinfo(5)``)."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["mount_points"]


def mount_points(
    fstype: str, option: str | None = None, *, mountinfo: str = "/proc/self/mountinfo"
) -> tuple[Path, ...]:
    """The mount points of ``fstype``, in the order of mounting; empty without ``/proc``.

    ``option`` keeps those whose super block has it, as a control group of version 1 does.
    """
    try:
        lines = Path(mountinfo).read_text().splitlines()
    except OSError:
        return ()
    found = []
    for line in lines:
        mount, _, superblock = line.partition(" - ")
        type_, _, rest = superblock.partition(" ")
        if type_ == fstype and (option is None or option in rest.split(" ")[-1].split(",")):
            found.append(Path(_unescape(mount.split(" ")[4])))
    return tuple(found)


def _unescape(text: str) -> str:
    """Space, tab, newline and backslash are written in octal there."""
    return re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), text)
