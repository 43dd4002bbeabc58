"""An initramfs is a cpio archive in the "newc" form: this writes one.

The kernel (``Documentation/driver-api/early-userspace/buffer-format.rst``) unpacks any number of
archives one behind the other, later ones over earlier ones, with zeros between them, provided that
each begins at a multiple of four bytes.  So an initramfs can be made in layers, and only the layer
that changed is made anew.

The same entries give the same bytes: no time, no owner and no inode number of this machine is in
them.
"""

from __future__ import annotations

import stat
from collections.abc import Iterable

__all__ = ["Archive"]

_MAGIC = b"070701"
_TRAILER = "TRAILER!!!"
_MAX_SIZE = (1 << 32) - 1  # eight hexadecimal digits


class Archive:
    """Collects entries in order; a directory comes by itself before what is in it.

    Paths are absolute, as they will be inside.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._directories: set[str] = set()
        self._count = 0

    def file(self, path: str, data: bytes, *, mode: int = 0o644) -> None:
        """A regular file.  Raises :class:`ValueError` from 4 GiB on, for want of digits."""
        if len(data) > _MAX_SIZE:
            raise ValueError(f"{path}: a newc archive holds files below 4 GiB")
        self._entry(path, stat.S_IFREG | mode, data)

    def directory(self, path: str, *, mode: int = 0o755) -> None:
        """A directory; made once, however often it is named."""
        name = path.strip("/")
        if name and name not in self._directories:
            self._directories.add(name)
            self._entry(path, stat.S_IFDIR | mode, b"")

    def symlink(self, path: str, target: str) -> None:
        """A symbolic link at ``path`` to ``target``."""
        self._entry(path, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, path: str, major: int, minor: int) -> None:
        """A device node, for root alone."""
        self._entry(path, stat.S_IFCHR | 0o600, b"", major, minor)

    def __bytes__(self) -> bytes:
        """The whole archive, its length a multiple of four."""
        return b"".join((*self._parts, _record(0, _TRAILER, 0, b"")))

    def _entry(self, path: str, mode: int, data: bytes, major: int = 0, minor: int = 0) -> None:
        name = path.strip("/")
        for parent in _parents(name):
            self.directory(parent)
        self._count += 1
        self._parts.append(_record(self._count, name, mode, data, major, minor))


def _parents(name: str) -> Iterable[str]:
    parts = name.split("/")[:-1]
    return ("/".join(parts[: n + 1]) for n in range(len(parts)))


def _record(inode: int, name: str, mode: int, data: bytes, major: int = 0, minor: int = 0) -> bytes:
    encoded = name.encode("utf-8", "surrogateescape") + b"\0"
    links = 2 if stat.S_ISDIR(mode) else 1
    # inode, mode, uid, gid, links, time, size, device (2), node (2), name's length, check
    fields = (inode, mode, 0, 0, links, 0, len(data), 0, 0, major, minor, len(encoded), 0)
    head = _MAGIC + b"".join(b"%08X" % field for field in fields) + encoded
    return _padded(head) + _padded(data)


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)
