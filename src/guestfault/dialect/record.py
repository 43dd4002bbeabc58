"""What one published version of the interface says, as one frozen record.

The fault path of the software KVM is written once and asks the record wherever versions differ.
A new version is a new record in :mod:`guestfault.dialect.published`, and a new field here only
where it differs in a way that no version before it did.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from guestfault.dialect.interface import MemoryFaultInterface

__all__ = ["Dialect", "Guard", "MissingFlag", "Site"]


class Guard(enum.Enum):
    """What the filling helper checks before it writes to ``kvm_run``."""

    NONE = "none"
    LOADED_VCPU = "loaded vCPU"


class Site(enum.Enum):
    """A place in KVM where a failed guest access can be annotated."""

    HANDLE_ERROR_PFN = "kvm_handle_error_pfn"


@dataclass(frozen=True, slots=True)
class MissingFlag:
    """The slot flag that asks for an exit as soon as fast GUP fails, and its capability."""

    name: str
    slot_flag: int
    cap_name: str
    cap: int


@dataclass(frozen=True, slots=True)
class Dialect:
    """One version of the interface.

    ``interface`` is what userspace sees of a fault; ``annotated`` the sites that fill it, with the
    flags each reports; ``missing`` the exit-on-missing slot flag, where there is one; ``source``
    where the version was published.
    """

    name: str
    source: str
    interface: MemoryFaultInterface
    guard: Guard
    annotated: frozenset[Site]
    missing: MissingFlag | None
    resets_exit_reason: bool = True
    """Whether KVM_RUN begins by writing KVM_EXIT_UNKNOWN, so that a bare -EFAULT looks bare."""
    flag_unknown: int = 0
    """Reported in ``memory_fault.flags`` for a failure whose reason KVM does not know."""
    flag_missing: int = 0
    """Reported for a failure in a slot that has the exit-on-missing flag."""
