"""The versions of the interface that the software KVM speaks, one record each.

More were published than are here (the series has seven versions, and others followed): each is one
more record in :data:`DIALECTS`.
"""

from __future__ import annotations

from collections.abc import Callable

from guestfault.dialect.interface import LINUX_6_8 as LINUX_6_8_INTERFACE
from guestfault.dialect.interface import SEED as SEED_INTERFACE
from guestfault.dialect.interface import MemoryFaultInterface
from guestfault.dialect.record import Dialect, Guard, MissingFlag, Site

__all__ = ["DIALECTS", "LINUX_6_8", "SEED", "missing_flag"]

SEED = Dialect(
    name="seed",
    source="kvm@vger, CAF7b7mof8HkcaSthEO8Wu9kf8ZHjE9c1TDzQGAYDYv7FN9+k9w@mail.gmail.com",
    interface=SEED_INTERFACE,
    guard=Guard.LOADED_VCPU,
    annotated=frozenset({Site.HANDLE_ERROR_PFN}),
    missing=MissingFlag(
        name="KVM_MEM_ABSENT_MAPPING_FAULT",
        slot_flag=1 << 2,
        cap_name="KVM_CAP_MEMORY_FAULT_NOWAIT",
        cap=228,
    ),
    flag_unknown=SEED_INTERFACE.flags["UNKNOWN"],
    flag_missing=SEED_INTERFACE.flags["ABSENT_MAPPING"],
)
"""The thread's own: -EFAULT and a filled run page, always, behind ``kvm_handle_efault``'s guard.

Numbers are those of the version under discussion there (WIP v2,
20230315021738.1151386-1-amoorthy@google.com); the return value and the missing opt-in are what the
discussion of it arrived at."""

LINUX_6_8 = Dialect(
    name="linux-6.8",
    source="Linux 6.8, commit 16f95f3b95ca",
    interface=LINUX_6_8_INTERFACE,
    guard=Guard.NONE,
    annotated=frozenset(),
    missing=None,
)
"""What was merged: the exit is there for private memory, an ordinary slot's -EFAULT is bare."""

DIALECTS = {dialect.name: dialect for dialect in (SEED, LINUX_6_8)}


def missing_flag(
    interface: MemoryFaultInterface | None, check_extension: Callable[[int], int]
) -> MissingFlag | None:
    """The slot flag by which a KVM with this interface can be told to exit on a missing page.

    ``None`` if it has none, as every released kernel: then absence must be made with userfaultfd or
    by protection.
    """
    for dialect in DIALECTS.values():
        missing = dialect.missing
        if dialect.interface is interface and missing and check_extension(missing.cap) > 0:
            return missing
    return None
