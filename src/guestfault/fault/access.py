"""Which guest access failed: one record, whoever found it out.

Every locator answers in these terms.  What it does not know is ``None``; nothing is filled in by
guessing, and :attr:`Access.certain` says whether the answer is a fact or the first of several
candidates.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

from guestfault.memory.slots import MemorySlot
from guestfault.x86.access_kind import AccessKind

__all__ = ["Access", "AccessKind", "FoundBy"]


class FoundBy(enum.StrEnum):
    """How an access became known."""

    ANNOTATION = "annotation"  # the kernel said so in kvm_run.memory_fault
    TRACEPOINT = "tracepoint"  # a tracepoint of KVM's on the vCPU's own thread
    DECODE = "decode"  # the instruction at RIP, and what of it the host cannot give
    MMIO = "mmio"  # KVM_EXIT_MMIO on an address that is RAM
    SIGNAL = "signal"  # SIGBUS, with the host's address of a page that is broken


class Access(NamedTuple):
    """A guest access.  Addresses in bytes; ``size`` in bytes, a page where only the page is known.

    ``kind`` is ``None`` where it is not told (Linux's annotation does not say).  ``instruction`` is
    the text of the instruction that makes it.  ``why`` is the reason for an answer that was
    reasoned out: what makes it certain, or what it is one of.
    """

    gpa: int | None
    size: int
    found_by: FoundBy
    gva: int | None = None
    hva: int | None = None
    slot: MemorySlot | None = None
    kind: AccessKind | None = None
    instruction: str | None = None
    certain: bool = True
    why: str = ""

    def __str__(self) -> str:
        what = str(self.kind) if self.kind is not None else "access"
        where = []
        if self.gva is not None:
            where.append(f"gva {self.gva:#x}")
        if self.gpa is not None:
            where.append(f"gpa {self.gpa:#x}")
        text = f"{what} of {self.size} bytes at {', '.join(where) or 'an unknown address'}"
        return f"{text} by `{self.instruction}`" if self.instruction else text
