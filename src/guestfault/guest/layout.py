"""Where things lie in the memory of a built-in guest.

Guest physical memory starts at 0 and has no holes: a header, then data ::

    page 0           the code, the same for every vCPU, and in long mode a TSS
    page 1 ...       the page tables, in long mode only
    the rest         data, a contiguous share for each vCPU

There is no stack and no parameter page: a vCPU is told its share in registers, so the header is
never written and its bytes are part of the checksum like any others.

In long mode the linear address of every byte is its physical address plus :data:`GVA_OFFSET`.  A
program that takes one for the other works on identity-mapped guests and nowhere else; here it fails
at once.  Real mode has no such choice: there a gva *is* a gpa.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from functools import cached_property
from typing import Final

from guestfault.errors import GuestfaultError
from guestfault.x86.tables import Mapping, PagingMode, table_pages_needed

__all__ = [
    "GVA_OFFSET",
    "MIN_MEMORY",
    "PAGE_SIZE",
    "REAL_MODE_LIMIT",
    "Layout",
    "LayoutError",
    "Mode",
]

PAGE_SIZE: Final = 4096
GVA_OFFSET: Final = 1 << 32
MIN_MEMORY: Final = 64 << 10
LONG_MODE_LIMIT: Final = 1 << 46  # below the canonical hole, GVA_OFFSET included
REAL_MODE_LIMIT: Final = 3 << 30  # the devices of a PC, its APICs among them, lie above


class LayoutError(GuestfaultError):
    """A guest was asked for that does not fit its memory.

    ``memory_size`` in bytes and ``vcpus`` are what was asked for, ``why`` says what does not fit.
    """

    def __init__(self, memory_size: int, vcpus: int, why: str) -> None:
        self.memory_size = memory_size
        self.vcpus = vcpus
        self.why = why
        super().__init__(f"a guest of {memory_size} bytes and {vcpus} vCPUs: {why}")


class Mode(StrEnum):
    """The processor mode that a built-in guest runs in.

    A host without full virtualization runs only ``LONG_CPL3`` natively and emulates the others one
    instruction at a time, with errors of another shape: hence three.
    """

    LONG_CPL3 = "long-cpl3"
    LONG_CPL0 = "long-cpl0"
    REAL = "real"  # with 4 GiB segment limits ("big" or "unreal" mode)

    @property
    def is_long(self) -> bool:
        """Whether the guest has page tables and 64-bit registers."""
        return self is not Mode.REAL

    @property
    def cpl(self) -> int:
        """The current privilege level."""
        return 3 if self is Mode.LONG_CPL3 else 0

    @property
    def word_size(self) -> int:
        """Bytes in the words that the guest sums and rewrites."""
        return 8 if self.is_long else 4


@dataclass(frozen=True)
class Layout:
    """The division of ``memory_size`` bytes among the header and ``vcpus`` vCPUs.

    ``memory_size`` is a multiple of 4096, at least :data:`MIN_MEMORY` and, in real mode, at most
    :data:`REAL_MODE_LIMIT`.  Raises :class:`LayoutError` for any other, and for a memory that
    leaves a vCPU without a data page.

    >>> Layout(1 << 20, Mode.LONG_CPL3, vcpus=2).share(1)
    range(130, 256)
    """

    memory_size: int
    mode: Mode
    vcpus: int = 1

    def __post_init__(self) -> None:
        why = self._misfit()
        if why:
            raise LayoutError(self.memory_size, self.vcpus, why)

    def _misfit(self) -> str:
        if self.vcpus < 1:
            return "there must be at least one vCPU"
        if self.memory_size % PAGE_SIZE:
            return f"the memory must be a multiple of {PAGE_SIZE} bytes"
        if self.memory_size < MIN_MEMORY:
            return f"the memory must be at least {MIN_MEMORY} bytes"
        if self.memory_size > LONG_MODE_LIMIT:
            return f"a built-in guest reaches {LONG_MODE_LIMIT} bytes"
        if self.mode is Mode.REAL and self.memory_size > REAL_MODE_LIMIT:
            return f"a real-mode guest reaches {REAL_MODE_LIMIT} bytes; use a long-mode guest"
        data = self.pages - self.header_pages
        if data < self.vcpus:
            return f"{data} of {self.pages} pages are left for data, and each vCPU needs one"
        return ""

    @property
    def pages(self) -> int:
        """Pages in all."""
        return self.memory_size // PAGE_SIZE

    @property
    def code(self) -> int:
        """The number of the code page."""
        return 0

    @property
    def mapping(self) -> Mapping:
        """What the page tables map: all the memory, in pages of 4 KiB.  For long mode."""
        user = self.mode.cpl == 3
        return Mapping(self.gva(0), gpa=0, length=self.memory_size, user=user)

    @cached_property
    def tables(self) -> range:
        """The numbers of the page-table pages; the first is the PML4.  Empty in real mode."""
        if not self.mode.is_long:
            return range(1, 1)
        return range(1, 1 + table_pages_needed(PagingMode.FOUR_LEVEL, [self.mapping]))

    @property
    def header_pages(self) -> int:
        """How many pages come before the data."""
        return self.tables.stop

    @property
    def data(self) -> range:
        """The numbers of all data pages."""
        return range(self.header_pages, self.pages)

    def share(self, vcpu: int) -> range:
        """The numbers of one vCPU's data pages; shares differ by one page at most."""
        count = len(self.data)
        return self.data[count * vcpu // self.vcpus : count * (vcpu + 1) // self.vcpus]

    @property
    def largest_share(self) -> int:
        """Pages in the largest share: the code's constants follow from it, for all vCPUs."""
        return -(-len(self.data) // self.vcpus)

    @property
    def index_mask(self) -> int:
        """The least 2^k - 1 that holds every page index of the largest share."""
        return (1 << (self.largest_share - 1).bit_length()) - 1

    def gva(self, gpa: int) -> int:
        """The linear address at which the guest sees a physical one."""
        return gpa + GVA_OFFSET if self.mode.is_long else gpa
