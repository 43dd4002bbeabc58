"""From a guest frame number to host memory that is there: the part of ``virt/kvm/kvm_main.c``.

:func:`hva_to_pfn` is where the series' whole trick lies: called ``atomic``, it gives up as soon as
fast GUP fails, where otherwise it would sleep in slow GUP until somebody resolves the page.

A pfn here is the hva's page number, since we have no physical addresses to speak of; the error
values keep the kernel's numbers (``include/linux/kvm_host.h``), which no page number can reach.
"""

from __future__ import annotations

import errno

from guestfault.dialect.interface import EHWPOISON
from guestfault.softkvm.memslots import KvmMemorySlot
from guestfault.softkvm.mm import Mm
from guestfault.uapi import kvm as uapi

__all__ = [
    "KVM_PFN_ERR_FAULT",
    "KVM_PFN_ERR_HWPOISON",
    "KVM_PFN_ERR_RO_FAULT",
    "KVM_PFN_ERR_SIGPENDING",
    "KVM_PFN_NOSLOT",
    "gfn_to_pfn_memslot",
    "hva_to_pfn",
    "is_error_pfn",
]

KVM_PFN_ERR_MASK = 0x7FF << 52
KVM_PFN_ERR_FAULT = KVM_PFN_ERR_MASK
KVM_PFN_ERR_HWPOISON = KVM_PFN_ERR_MASK + 1
KVM_PFN_ERR_RO_FAULT = KVM_PFN_ERR_MASK + 2
KVM_PFN_ERR_SIGPENDING = KVM_PFN_ERR_MASK + 3
KVM_PFN_NOSLOT = 1 << 63


def is_error_pfn(pfn: int) -> bool:
    """Whether ``pfn`` is one of the ERR values.  ``KVM_PFN_NOSLOT`` is not an error."""
    return pfn & KVM_PFN_ERR_MASK != 0


def hva_to_pfn(
    mm: Mm, addr: int, *, atomic: bool, write_fault: bool, want_writable: bool
) -> tuple[int, bool]:
    """Find the page behind a host address: ``(pfn or error, writable)``.

    ``want_writable`` says that a read fault may be answered with a writable page, if that is free.
    """
    # Fast GUP for read faults too, as the series has it: a slot that exits on a missing page
    # would otherwise exit on every read of a read-only slot.
    fast_write = write_fault or want_writable
    if mm.get_user_page_fast_only(addr, fast_write):
        return addr >> 12, fast_write
    if atomic:
        return KVM_PFN_ERR_FAULT, False
    r = mm.get_user_pages_unlocked(addr, write_fault)
    if r == 0:
        writable = write_fault or (want_writable and mm.get_user_page_fast_only(addr, True))
        return addr >> 12, writable
    if r == -errno.EINTR:
        return KVM_PFN_ERR_SIGPENDING, False
    if r == -EHWPOISON:
        return KVM_PFN_ERR_HWPOISON, False
    return KVM_PFN_ERR_FAULT, False


def gfn_to_pfn_memslot(
    mm: Mm, slot: KvmMemorySlot, gfn: int, *, atomic: bool, write_fault: bool
) -> tuple[int, bool]:
    """``__gfn_to_pfn_memslot``: :func:`hva_to_pfn` with the slot's own rights applied."""
    readonly = bool(slot.flags & uapi.KVM_MEM_READONLY)
    if write_fault and readonly:
        return KVM_PFN_ERR_RO_FAULT, False
    return hva_to_pfn(
        mm,
        slot.hva_of_gfn(gfn),
        atomic=atomic,
        write_fault=write_fault,
        want_writable=not readonly,
    )
