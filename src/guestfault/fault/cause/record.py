"""One cause: what it is, and what would let a retry of the access succeed."""

from __future__ import annotations

import enum
from dataclasses import dataclass

__all__ = ["Cause", "Kind", "Remedy"]


class Kind(enum.StrEnum):
    """Why the host could not serve an access, about in the order that the kernel meets them in."""

    UNKNOWN = "unknown"
    NO_SLOT = "no slot"
    NO_GUEST_MEMFD = "no guest_memfd"
    PRIVATE_MISMATCH = "private/shared mismatch"
    GUEST_MEMFD_GONE = "guest_memfd gone"
    READ_ONLY_SLOT = "read-only slot"
    NO_MAPPING = "no mapping"
    DEVICE_MAPPING = "device mapping"
    NO_ACCESS = "no access"
    READ_ONLY_MAPPING = "read-only mapping"
    HWPOISON = "hwpoison"
    GUARD_REGION = "guard region"
    UFFD_WRITE_PROTECTED = "write-protected by userfaultfd"
    PRESENT = "present"
    PAST_END_OF_FILE = "past the end of the file"
    UFFD_MINOR = "minor under userfaultfd"
    UFFD_MISSING = "missing under userfaultfd"
    FILE_SYSTEM_FULL = "file system full"
    MEMORY_CGROUP_LIMIT = "memory cgroup at its limit"
    HUGETLB_CGROUP_LIMIT = "hugetlb cgroup at its limit"
    HUGETLB_POOL_EMPTY = "hugetlb pool empty"
    NOT_MAPPED_IN = "not mapped in"


class Remedy(enum.StrEnum):
    """The action after which a retry succeeds, by the name of the call or the file that does it."""

    NONE = "none"
    RETRY = "retry"
    ADD_SLOT = "KVM_SET_USER_MEMORY_REGION"
    ADD_GUEST_MEMFD = "KVM_SET_USER_MEMORY_REGION2"
    CONVERT = "KVM_SET_MEMORY_ATTRIBUTES"
    MAP = "mmap"
    PROTECT = "mprotect"
    REMOVE_GUARD = "MADV_GUARD_REMOVE"
    POPULATE = "MADV_POPULATE_WRITE"
    COPY = "UFFDIO_COPY"
    CONTINUE = "UFFDIO_CONTINUE"
    WRITE_UNPROTECT = "UFFDIO_WRITEPROTECT"
    GROW_FILE = "ftruncate"
    FREE_SPACE = "free space"
    RAISE_MEMORY_LIMIT = "memory.max"
    RAISE_HUGETLB_LIMIT = "hugetlb.max"
    ADD_HUGE_PAGES = "nr_hugepages"


@dataclass(frozen=True, slots=True)
class Cause:
    """Why an access failed.

    ``what`` is one sentence with the numbers.  ``by`` is what resolves it, ``how`` the same with
    this case's arguments.  ``certain``: the evidence allows nothing else; otherwise it is one of
    several candidates, and ``what`` is still true of the page, only perhaps not to blame.

    >>> cause = Cause(Kind.NO_MAPPING, "nothing is mapped at 0x7f0000000000", Remedy.MAP)
    >>> match cause:
    ...     case Cause(kind=Kind.NO_MAPPING | Kind.PAST_END_OF_FILE):
    ...         print("a mistake in the VMM:", cause)
    a mistake in the VMM: nothing is mapped at 0x7f0000000000 (resolved by mmap)
    """

    kind: Kind
    what: str
    by: Remedy
    how: str = ""
    certain: bool = True

    @property
    def resolvable(self) -> bool:
        """Whether anything that a VMM can do makes a retry succeed with the right content."""
        return self.by is not Remedy.NONE

    def __str__(self) -> str:
        head = self.what if self.certain else f"possibly: {self.what}"
        if self.resolvable:
            end = f"resolved by {self.by}" + (f": {self.how}" if self.how else "")
        else:
            end = "cannot be resolved" + (f": {self.how}" if self.how else "")
        return f"{head} ({end})"
