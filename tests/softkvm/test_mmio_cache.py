"""Frames that are known to be no memory, and how that knowledge ends."""

import pytest
from tests.softkvm.modelled_mm import HVA, NPAGES, PRESENT, WRITABLE, WRITE, at

from guestfault.softkvm import mmu
from guestfault.softkvm.mmio_cache import mmio_info_in_cache, vcpu_cache_mmio_info
from guestfault.softkvm.mmu_internal import RetPf
from guestfault.softkvm.refusal import Emulate, Retry
from guestfault.softkvm.second_stage import is_mmio_spte, make_mmio_spte
from guestfault.x86.registers import PFERR_RSVD_MASK

RSVD = PRESENT | PFERR_RSVD_MASK
DEVICE = NPAGES + 4


def test_a_frame_without_memory_is_looked_for_once(make, monkeypatch):
    one = make()
    generation = one.kvm.memslots.generation
    assert not one.violation(DEVICE)
    assert one.stage.sptes == {DEVICE: make_mmio_spte(generation)}
    assert one.vcpu.stat.pf_mmio_spte_created == 1
    monkeypatch.setattr(mmu, "kvm_mmu_do_page_fault", None)  # which the next one does not call
    for code in (RSVD, RSVD | WRITE):
        one.vcpu.mmio = None
        assert not one.violation(DEVICE, code)  # found in the table,
        one.stage.sptes.clear()
        assert not one.violation(DEVICE, code)  # and remembered without it
        assert isinstance(one.vcpu.refusal, Emulate)
        one.stage.sptes[DEVICE] = make_mmio_spte(generation)


def test_a_new_slot_makes_what_was_found_out_about_devices_stale(make):
    """INVALID, and the slow way again: to memory, or to a device once more."""
    one = make()
    one.violation(DEVICE)
    one.violation(DEVICE + 1)
    one.vm.set_user_memory_region(1, DEVICE << 12, 0x1000, HVA)
    one.all_present()
    assert one.violation(DEVICE, RSVD)
    assert one.stage.sptes[DEVICE] == HVA | WRITABLE
    assert not one.violation(DEVICE + 1, RSVD)
    assert one.stage.sptes[DEVICE + 1] == make_mmio_spte(one.kvm.memslots.generation)


def test_an_mmio_entry_that_has_gone_meanwhile_is_no_bug(make):
    one = make()
    one.violation(DEVICE)
    one.vcpu.mmio = None
    one.stage.sptes.clear()
    assert not one.violation(DEVICE, RSVD)
    assert isinstance(one.vcpu.refusal, Retry)


def test_without_mmio_caching_every_access_takes_the_slow_way(make):
    one = make()
    one.kvm.enable_mmio_caching = False
    assert not one.violation(DEVICE)
    assert isinstance(one.vcpu.refusal, Emulate)
    assert one.stage.sptes == {}


def test_a_slot_published_while_a_device_is_looked_for(make):
    """The entry has the generation of the list that was read, so the slot is found at once."""
    one = make()
    one.all_present()

    def add_slot():
        one.vm.set_user_memory_region(1, DEVICE << 12, 0x1000, HVA)

    with at("direct_page_fault: take mmu_lock", add_slot):
        assert one.fault(DEVICE) == RetPf.EMULATE
    assert is_mmio_spte(one.stage.sptes[DEVICE])
    assert one.violation(DEVICE, RSVD)
    assert one.stage.sptes[DEVICE] == HVA | WRITABLE


def test_a_late_mmio_entry_does_not_replace_memory(make):
    """An entry for memory is what an invalidation finds: it must not get lost."""
    one = make()
    one.all_present()

    def add_and_map():
        one.vm.set_user_memory_region(1, DEVICE << 12, 0x1000, HVA)
        assert one.fault(DEVICE) == RetPf.FIXED

    with at("direct_page_fault: take mmu_lock", add_and_map):
        assert one.fault(DEVICE) == RetPf.RETRY
    assert one.stage.sptes[DEVICE] == HVA | WRITABLE


@pytest.mark.parametrize(("tdp", "addr"), [(True, 0x5123), (False, 0x7FFF_F123)])
def test_what_the_vcpu_remembers_is_known_by_its_kind_of_address(make, tdp, addr):
    one = make()
    one.kvm.tdp_enabled = tdp
    vcpu_cache_mmio_info(one.vcpu, 0 if tdp else addr, 5, 3)
    assert mmio_info_in_cache(one.vcpu, addr, 3)
    assert not mmio_info_in_cache(one.vcpu, addr, 4)
    assert not mmio_info_in_cache(one.vcpu, addr + 0x1000, 3)
    vcpu_cache_mmio_info(one.vcpu, 0, 0, 3)
    assert not mmio_info_in_cache(one.vcpu, 0, 3)  # frame 0 is "nothing remembered"
