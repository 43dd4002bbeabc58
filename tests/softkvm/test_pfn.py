"""hva_to_pfn against a modelled memory: what each of GUP's answers becomes."""

from __future__ import annotations

import errno

import pytest

from guestfault.dialect.interface import EHWPOISON
from guestfault.softkvm.memslots import KVM_MEMSLOT_INVALID, KvmMemorySlot
from guestfault.softkvm.pfn import (
    KVM_PFN_ERR_FAULT,
    KVM_PFN_ERR_HWPOISON,
    KVM_PFN_ERR_RO_FAULT,
    KVM_PFN_ERR_SIGPENDING,
    KVM_PFN_NOSLOT,
    gfn_to_pfn_memslot,
    hva_to_pfn,
    is_error_noslot_pfn,
    is_error_pfn,
)
from guestfault.uapi import kvm as uapi

HVA = 0x7F00_0000_0000


class ModelMm:
    """Fast GUP finds what is in ``fast``; slow GUP answers ``slow``; what is asked is recorded."""

    def __init__(self, fast: set[bool], slow: int = 0, *, valid: bool = True) -> None:
        self.fast, self.slow, self.valid = fast, slow, valid
        self.asked: list[tuple[str, bool]] = []
        self.how: tuple[bool, object] = False, None

    def get_user_page_fast_only(self, hva: int, write: bool) -> bool:
        self.asked.append(("fast", write))
        return write in self.fast

    def get_user_pages_unlocked(
        self, hva: int, write: bool, *, nowait: bool = False, interruptible: object = None
    ) -> int:
        self.asked.append(("slow", write))
        self.how = nowait, interruptible
        return self.slow

    def vma_is_valid(self, hva: int, write: bool) -> bool:
        self.asked.append(("vma", write))
        return self.valid


def test_no_slot_is_not_an_error_pfn_and_no_page_number_is_one():
    assert not is_error_pfn(KVM_PFN_NOSLOT)
    assert not is_error_pfn((1 << 47) >> 12)
    errors = (KVM_PFN_ERR_FAULT, KVM_PFN_ERR_HWPOISON, KVM_PFN_ERR_RO_FAULT)
    assert all(is_error_pfn(pfn) for pfn in errors)


def test_atomic_never_reaches_slow_gup():
    mm = ModelMm(set())
    found = hva_to_pfn(mm, HVA, False, True, atomic=True)
    assert found == (KVM_PFN_ERR_FAULT, False, False)
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
    assert hva_to_pfn(mm, HVA, True, True) == (pfn, False, False)


def test_a_read_fault_gets_a_writable_page_where_that_is_free():
    mm = ModelMm({True})
    found = hva_to_pfn(mm, HVA, False, True)
    assert found == (HVA >> 12, True, False)
    assert mm.asked == [("fast", True)]  # and nothing was faulted in for it


def test_a_read_only_slot_refuses_a_write_without_looking():
    slot = KvmMemorySlot(0, 0x10, 4, HVA, uapi.KVM_MEM_READONLY)
    mm = ModelMm({True, False})
    found = gfn_to_pfn_memslot(mm, slot, 0x11, True)
    assert (found, mm.asked) == ((KVM_PFN_ERR_RO_FAULT, False, False), [])
    found = gfn_to_pfn_memslot(mm, slot, 0x11, False)
    assert found == ((HVA >> 12) + 1, False, False)
    assert mm.asked == [("fast", False)]  # never more than a read of it


def test_a_slot_on_its_way_out_has_no_addresses():
    slot = KvmMemorySlot(0, 0x10, 4, HVA, KVM_MEMSLOT_INVALID | uapi.KVM_MEM_READONLY)
    for write in (False, True):
        mm = ModelMm({True, False})
        assert gfn_to_pfn_memslot(mm, slot, 0x11, write) == (KVM_PFN_NOSLOT, False, False)
        assert mm.asked == []
    assert is_error_noslot_pfn(KVM_PFN_NOSLOT)
    assert not is_error_noslot_pfn(HVA >> 12)


def test_fast_gup_for_a_read_that_wants_no_writable_page_is_the_series_own():
    mm = ModelMm({False})
    assert hva_to_pfn(mm, HVA, False, False, fast_reads=False) == (HVA >> 12, False, False)
    assert mm.asked == [("slow", False)]
    mm = ModelMm({False})
    assert hva_to_pfn(mm, HVA, False, False, atomic=True, fast_reads=False)[0] == KVM_PFN_ERR_FAULT
    assert mm.asked == []


def test_after_a_read_the_page_is_asked_for_writing_once_more():
    """The opportunistic upgrade: it costs nothing where the page is writable already."""
    mm = ModelMm(set())
    assert hva_to_pfn(mm, HVA, False, True) == (HVA >> 12, False, False)
    assert mm.asked == [("fast", True), ("slow", False), ("fast", True)]


@pytest.mark.parametrize("valid", [False, True])
def test_async_is_reported_only_for_a_mapping_that_permits_the_access(valid):
    mm = ModelMm(set(), -errno.EAGAIN, valid=valid)
    assert hva_to_pfn(mm, HVA, True, True, nowait=True) == (KVM_PFN_ERR_FAULT, False, valid)
    assert mm.asked == [("fast", True), ("slow", True), ("vma", True)]
    assert mm.how == (True, None)


@pytest.mark.parametrize("number", [errno.EINTR, EHWPOISON])
def test_what_no_waiting_would_mend_is_not_async(number):
    mm = ModelMm(set(), -number)
    assert hva_to_pfn(mm, HVA, True, True, nowait=True)[2] is False


def test_who_may_be_interrupted_is_handed_on():
    mm, task = ModelMm(set()), object()
    hva_to_pfn(mm, HVA, True, True, interruptible=task)
    assert mm.how == (False, task)


def test_atomic_and_async_exclude_each_other():
    with pytest.raises(AssertionError):
        hva_to_pfn(ModelMm(set()), HVA, True, True, atomic=True, nowait=True)
