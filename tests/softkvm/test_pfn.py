"""hva_to_pfn against a modelled memory: what each of GUP's answers becomes."""

from __future__ import annotations

import errno

import pytest

from guestfault.dialect.interface import EHWPOISON
from guestfault.softkvm.memslots import KvmMemorySlot
from guestfault.softkvm.pfn import (
    KVM_PFN_ERR_FAULT,
    KVM_PFN_ERR_HWPOISON,
    KVM_PFN_ERR_RO_FAULT,
    KVM_PFN_ERR_SIGPENDING,
    KVM_PFN_NOSLOT,
    gfn_to_pfn_memslot,
    hva_to_pfn,
    is_error_pfn,
)
from guestfault.uapi import kvm as uapi

HVA = 0x7F00_0000_0000


class ModelMm:
    """Fast GUP finds what is in ``fast``; slow GUP answers ``slow``; both are recorded."""

    def __init__(self, fast: set[bool], slow: int = 0) -> None:
        self.fast, self.slow = fast, slow
        self.asked: list[tuple[str, bool]] = []

    def get_user_page_fast_only(self, hva: int, write: bool) -> bool:
        self.asked.append(("fast", write))
        return write in self.fast

    def get_user_pages_unlocked(self, hva: int, write: bool) -> int:
        self.asked.append(("slow", write))
        return self.slow


def test_no_slot_is_not_an_error_pfn_and_no_page_number_is_one():
    assert not is_error_pfn(KVM_PFN_NOSLOT)
    assert not is_error_pfn((1 << 47) >> 12)
    errors = (KVM_PFN_ERR_FAULT, KVM_PFN_ERR_HWPOISON, KVM_PFN_ERR_RO_FAULT)
    assert all(is_error_pfn(pfn) for pfn in errors)


def test_atomic_never_reaches_slow_gup():
    mm = ModelMm(set())
    found = hva_to_pfn(mm, HVA, atomic=True, write_fault=False, want_writable=True)
    assert found == (KVM_PFN_ERR_FAULT, False)
    assert mm.asked == [("fast", True)]


@pytest.mark.parametrize(
    ("result", "pfn"),
    [
        (-errno.EFAULT, KVM_PFN_ERR_FAULT),
        (-errno.EINTR, KVM_PFN_ERR_SIGPENDING),
        (-EHWPOISON, KVM_PFN_ERR_HWPOISON),
        (-errno.ENOMEM, KVM_PFN_ERR_FAULT),
    ],
)
def test_how_slow_gup_fails_is_kept(result, pfn):
    mm = ModelMm(set(), result)
    assert hva_to_pfn(mm, HVA, atomic=False, write_fault=True, want_writable=True) == (pfn, False)


def test_a_read_fault_gets_a_writable_page_where_that_is_free():
    mm = ModelMm({True})
    found = hva_to_pfn(mm, HVA, atomic=False, write_fault=False, want_writable=True)
    assert found == (HVA >> 12, True)
    assert mm.asked == [("fast", True)]  # and nothing was faulted in for it


def test_a_read_only_slot_refuses_a_write_without_looking():
    slot = KvmMemorySlot(0, 0x10, 4, HVA, uapi.KVM_MEM_READONLY)
    mm = ModelMm({True, False})
    found = gfn_to_pfn_memslot(mm, slot, 0x11, atomic=False, write_fault=True)
    assert (found, mm.asked) == ((KVM_PFN_ERR_RO_FAULT, False), [])
    found = gfn_to_pfn_memslot(mm, slot, 0x11, atomic=False, write_fault=False)
    assert found == ((HVA >> 12) + 1, False)
    assert mm.asked == [("fast", False)]  # never more than a read of it
