"""From a guest frame number to host memory that is there: the part of ``virt/kvm/kvm_main.c``.

:func:`hva_to_pfn` has four ways of asking, and they differ in what it may cost:

- *fast*: is the page mapped, with the right to write?  Nothing is brought in, nobody sleeps.
- *atomic*: no more than that.  Here lies the series' whole trick: such a lookup gives up where
  others would sleep in slow GUP until somebody resolves the page.
- *async* (``FOLL_NOWAIT``): bring the page in if that needs no waiting.  If it does need some, and
  the mapping permits the access, say so: somebody else can do the waiting.
- *slow*: bring it in, however long that takes; a signal ends the sleep if it is *interruptible*.

A read is answered with a writable page where that costs nothing, so that the write that often
follows is no fault.

A pfn here is the hva's page number, since we have no physical addresses to speak of; the error
values keep the kernel's numbers (``include/linux/kvm_host.h``), which no page number can reach.
What has no struct pages (``VM_PFNMAP``: device memory) the kernel maps after GUP has refused it
(``hva_to_pfn_remapped``).  Here it stays refused, with ``KVM_PFN_ERR_FAULT``: our processor would
have to be given a host's device for memory.
"""

from __future__ import annotations

import errno

from guestfault.dialect.interface import EHWPOISON
from guestfault.softkvm.memslots import KVM_MEMSLOT_INVALID, PAGE_SIZE, KvmMemorySlot
from guestfault.softkvm.mm import Mm, Task
from guestfault.uapi import kvm as uapi

__all__ = [
    "KVM_PFN_ERR_FAULT",
    "KVM_PFN_ERR_HWPOISON",
    "KVM_PFN_ERR_MASK",
    "KVM_PFN_ERR_RO_FAULT",
    "KVM_PFN_ERR_SIGPENDING",
    "KVM_PFN_NOSLOT",
    "FoundPfn",
    "gfn_to_pfn_memslot",
    "hva_to_pfn",
    "is_error_noslot_pfn",
    "is_error_pfn",
]

KVM_PFN_ERR_MASK = 0x7FF << 52
KVM_PFN_ERR_FAULT = KVM_PFN_ERR_MASK
KVM_PFN_ERR_HWPOISON = KVM_PFN_ERR_MASK + 1
KVM_PFN_ERR_RO_FAULT = KVM_PFN_ERR_MASK + 2
KVM_PFN_ERR_SIGPENDING = KVM_PFN_ERR_MASK + 3
KVM_PFN_NOSLOT = 1 << 63
_READONLY = uapi.KVM_MEM_READONLY
_ERROR_NOSLOT_MASK = KVM_PFN_ERR_MASK | KVM_PFN_NOSLOT


FoundPfn = tuple[int, bool, bool]
"""A pfn or an error; whether it may be written; whether waiting would have helped."""

_ERR_FAULT: FoundPfn = KVM_PFN_ERR_FAULT, False, False
_NEEDS_WAIT: FoundPfn = KVM_PFN_ERR_FAULT, False, True
_NOSLOT: FoundPfn = KVM_PFN_NOSLOT, False, False
_RO_FAULT: FoundPfn = KVM_PFN_ERR_RO_FAULT, False, False


def is_error_pfn(pfn: int) -> bool:
    """Whether ``pfn`` is one of the ERR values.  ``KVM_PFN_NOSLOT`` is not an error."""
    return pfn & KVM_PFN_ERR_MASK != 0


def is_error_noslot_pfn(pfn: int) -> bool:
    """Whether ``pfn`` is no page, for whatever reason."""
    return pfn & _ERROR_NOSLOT_MASK != 0


def hva_to_pfn(
    mm: Mm,
    addr: int,
    write_fault: bool,
    want_writable: bool,
    atomic: bool = False,
    nowait: bool = False,
    interruptible: Task | None = None,
    fast_reads: bool = True,
) -> FoundPfn:
    """Find the page behind a host address.

    ``atomic``, ``nowait`` (not both) and ``interruptible`` choose the way, as the module says: the
    last is the task whose signal ends the sleep.  ``want_writable``
    says that a read may be answered with a writable page.  ``fast_reads``: fast GUP is tried for a
    read that wants no such page, too; before and after the series it is not.
    """
    assert not (atomic and nowait)
    fast_write = write_fault or want_writable
    if (fast_write or fast_reads) and mm.get_user_page_fast_only(addr, fast_write):
        return addr >> 12, fast_write, False
    if atomic:
        return _ERR_FAULT
    r = mm.get_user_pages_unlocked(addr, write_fault, nowait=nowait, interruptible=interruptible)
    if r == 0:
        # As after the read of a page that the process itself has written.
        writable = write_fault or (want_writable and mm.get_user_page_fast_only(addr, True))
        return addr >> 12, writable, False
    if r == -errno.EINTR:
        return KVM_PFN_ERR_SIGPENDING, False, False
    if r == -EHWPOISON:
        return KVM_PFN_ERR_HWPOISON, False, False
    if nowait and mm.vma_is_valid(addr, write_fault):
        return _NEEDS_WAIT
    return _ERR_FAULT


def gfn_to_pfn_memslot(
    mm: Mm,
    slot: KvmMemorySlot,
    gfn: int,
    write_fault: bool,
    atomic: bool = False,
    nowait: bool = False,
    interruptible: Task | None = None,
    fast_reads: bool = True,
) -> FoundPfn:
    """``__gfn_to_pfn_memslot``: :func:`hva_to_pfn` with the slot's own rights applied."""
    flags = slot.flags
    readonly = flags & _READONLY != 0
    if flags & KVM_MEMSLOT_INVALID:
        return _NOSLOT
    if write_fault and readonly:
        return _RO_FAULT
    addr = slot.userspace_addr + (gfn - slot.base_gfn) * PAGE_SIZE
    return hva_to_pfn(
        mm, addr, write_fault, not readonly, atomic, nowait, interruptible, fast_reads
    )
