"""The mappings of a process as ``/proc/PID/maps`` lists them: which file, which part, which access.

To say why an access failed, one needs what the kernel looks at first: the virtual memory area (VMA)
that the address lies in, or the fact that it lies in none.  ``maps`` has one line for each, sorted
by address; ``smaps`` adds the page size and a ``VmFlags`` line with what ``maps`` has no column for
(``um`` and ``uw``: registered with userfaultfd for missing pages and write protection, ``ui`` for
minor faults; ``pf``: ``VM_PFNMAP``; ``ht``: hugetlb).  The formats are in
``Documentation/filesystems/proc.rst``.

``smaps`` walks every page table and takes milliseconds for a large process, so it is read only when
asked for.  A list is of the moment; the process may change its mappings while it is being read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from guestfault.errors import KernelError

__all__ = ["Vma", "find", "parse", "vmas"]

_LINE = re.compile(
    r"(?P<start>[0-9a-f]+)-(?P<end>[0-9a-f]+) (?P<perms>[r-][w-][x-][ps]) (?P<offset>[0-9a-f]+) "
    r"(?P<major>[0-9a-f]+):(?P<minor>[0-9a-f]+) (?P<inode>\d+)\s*(?P<path>.*)"
)
_DELETED = " (deleted)"


@dataclass(frozen=True, slots=True)
class Vma:
    """One mapping: ``[start, end)``, host virtual addresses.

    ``offset`` (bytes), ``dev`` (major, minor), ``inode`` and ``path`` are the file's; without a
    file they are 0, and ``path`` is empty or a name such as ``[heap]``.  ``deleted``: the file has
    no name any more, or never had one, as a memfd (``/memfd:NAME``).  ``shared``: ``MAP_SHARED``,
    else copy-on-write.  ``flags`` are the two-letter ``VmFlags`` and ``page_size`` is that
    of its pages in bytes (``KernelPageSize``; larger for hugetlb), ``None`` if they were not asked
    for.
    """

    start: int
    end: int
    read: bool
    write: bool
    execute: bool
    shared: bool
    offset: int
    dev: tuple[int, int]
    inode: int
    path: str
    deleted: bool
    flags: frozenset[str] | None = None
    page_size: int | None = None

    @property
    def size(self) -> int:
        """Length in bytes."""
        return self.end - self.start

    def __contains__(self, address: object) -> bool:
        return isinstance(address, int) and self.start <= address < self.end

    def offset_of(self, address: int) -> int:
        """The offset in the file of what is mapped at ``address``."""
        return address - self.start + self.offset


def parse(text: str) -> Iterator[Vma]:
    """The records in the text of a ``maps`` or ``smaps`` file, in its order.

    Of the lines that ``smaps`` adds, ``KernelPageSize`` and ``VmFlags`` are read.
    """
    vma: Vma | None = None
    # Not splitlines(): a path may hold any other control character.  The kernel escapes \n in it.
    for line in text.split("\n"):
        if match := _LINE.fullmatch(line):
            if vma is not None:
                yield vma
            vma = _vma(match)
        elif vma is not None and line.startswith("VmFlags:"):
            vma = replace(vma, flags=frozenset(line.split()[1:]))
        elif vma is not None and line.startswith("KernelPageSize:"):
            vma = replace(vma, page_size=int(line.split()[1]) << 10)
    if vma is not None:
        yield vma


def _vma(match: re.Match[str]) -> Vma:
    number = {name: int(match[name], 16) for name in ("start", "end", "offset", "major", "minor")}
    perms, path = match["perms"], match["path"]
    return Vma(
        start=number["start"],
        end=number["end"],
        read=perms[0] == "r",
        write=perms[1] == "w",
        execute=perms[2] == "x",
        shared=perms[3] == "s",
        offset=number["offset"],
        dev=(number["major"], number["minor"]),
        inode=int(match["inode"]),
        path=path.removesuffix(_DELETED).replace(r"\012", "\n"),
        deleted=path.endswith(_DELETED),
    )


def vmas(pid: int | str = "self", *, flags: bool = False) -> list[Vma]:
    """Every mapping of a process by address; with what only ``smaps`` says if asked (``flags``).

    Raises :class:`~guestfault.errors.KernelError`: ENOENT or ESRCH if there is no such process,
    EACCES or EPERM if it may not be looked at.
    """
    path = Path(f"/proc/{pid}/{'smaps' if flags else 'maps'}")
    try:
        text = path.read_bytes().decode(errors="surrogateescape")
    except OSError as e:
        raise KernelError("read", e.errno or 0, str(path)) from None
    return list(parse(text))


def find(address: int, pid: int | str = "self", *, flags: bool = False) -> Vma | None:
    """The mapping that ``address`` lies in, or ``None``.  Raises as :func:`vmas` does."""
    return next((vma for vma in vmas(pid, flags=flags) if address in vma), None)
