"""The two published tables of demand paging by number of vCPUs, as they were posted.

Both are kvm/selftests' ``demand_paging_test -b 64M -u MINOR -s shmem -v N`` (64 MiB per vCPU, one
write to each page, resolved by UFFDIO_CONTINUE) on four AMD EPYC 7B13 with 64 cores each, once with
userfaultfd's handler threads and once with the series' memory fault exits.  The figures are
thousands of pages per second, rounded as posted; a 1 in the second table stands for anything from
0.5 to 1.5.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Final

__all__ = ["TABLES", "VCPUS", "Layout", "Published"]

VCPUS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256)


class Layout(Enum):
    """How the guest's memory is registered with userfaultfd."""

    SHARED = "one userfaultfd for all, a reader thread per vCPU"
    PER_VCPU = "a userfaultfd and a reader thread for each vCPU"


@dataclass(frozen=True, slots=True)
class Published:
    """One table: thousands of pages per second at each of :data:`VCPUS`."""

    layout: Layout
    source: str
    per_vcpu: bool
    """Whether the figures are per vCPU; otherwise they are the whole VM's."""
    uffd: tuple[int, ...]
    exits: tuple[int, ...]


TABLES: Final = (
    Published(
        layout=Layout.SHARED,
        source="20230215011614.725983-1-amoorthy@google.com",
        per_vcpu=False,
        uffd=(150, 191, 210, 155, 130, 108, 86, 62, 36),
        exits=(340, 477, 809, 1239, 1595, 2299, 3482, 4134, 4012),
    ),
    Published(
        layout=Layout.PER_VCPU,
        source="CAF7b7mr-_U6vU1iOwukdmOoaT0G1ttyxD62cv=vebnQeXL3R0w@mail.gmail.com",
        per_vcpu=True,
        uffd=(180, 85, 80, 39, 18, 8, 4, 1, 1),
        exits=(307, 220, 206, 163, 104, 73, 57, 37, 16),
    ),
)
