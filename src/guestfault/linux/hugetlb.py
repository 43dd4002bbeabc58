"""The pools that hugetlb pages come from: ``/sys/kernel/mm/hugepages``.

There is one pool for each huge page size.  It holds the pages that somebody put aside
(``nr_hugepages``), and may borrow more from the ordinary memory (``nr_overcommit_hugepages``; those
borrowed are its *surplus*).  ``mmap`` reserves pages for a mapping, unless it is told not to
(``MAP_NORESERVE``); a fault without a reservation fails once all that is free is reserved.
(``Documentation/admin-guide/mm/hugetlbpage.rst``, ``mm/hugetlb.c``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

__all__ = ["POOLS", "Pool", "pools"]

POOLS = "/sys/kernel/mm/hugepages"


@dataclass(frozen=True, slots=True, order=True)
class Pool:
    """One pool; ``page_size`` in bytes, the rest in pages, as the files of these names say them."""

    page_size: int
    total: int  # nr_hugepages
    free: int
    reserved: int
    overcommit: int
    surplus: int

    def available(self, *, with_reservation: bool = False) -> int:
        """How many more pages a fault can have, with a page reserved for it or without."""
        own = self.free if with_reservation else self.free - self.reserved
        return max(0, own) + max(0, self.overcommit - self.surplus)


def pools(directory: str | Path = POOLS) -> tuple[Pool, ...]:
    """Every pool, the smallest pages first; empty for a kernel without huge pages."""
    return tuple(sorted(_pool(found) for found in Path(directory).glob("hugepages-*kB")))


def _pool(directory: Path) -> Pool:
    def count(name: str) -> int:
        try:
            return int((directory / name).read_text())
        except OSError:  # the root of a container can hide some
            return 0

    return Pool(
        page_size=int(directory.name.removeprefix("hugepages-").removesuffix("kB")) << 10,
        total=count("nr_hugepages"),
        free=count("free_hugepages"),
        reserved=count("resv_hugepages"),
        overcommit=count("nr_overcommit_hugepages"),
        surplus=count("surplus_hugepages"),
    )
