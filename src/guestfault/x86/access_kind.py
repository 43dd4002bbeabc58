"""The direction of an access: what the page walk, the instruction and the host must agree on."""

from __future__ import annotations

import enum

__all__ = ["AccessKind"]


class AccessKind(enum.IntEnum):
    """What an access does.  Its numbers are part of a walk's tables: bit 0 is set if it writes.

    To the processor a read-modify-write is a write from its first read on; it has a member of its
    own because an instruction's account tells the two apart.

    >>> print(AccessKind.READ_WRITE, AccessKind.READ_WRITE.writes)
    read-write True
    """

    READ = 0
    WRITE = 1
    FETCH = 2
    READ_WRITE = 3

    @property
    def writes(self) -> bool:
        """Whether a read-only mapping would make it fail."""
        return bool(self & 1)

    def __str__(self) -> str:
        return self.name.lower().replace("_", "-")
