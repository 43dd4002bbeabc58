"""Frames whose writes KVM must see."""

from tests.softkvm.modelled_mm import HVA, NPAGES, PRESENT, WRITABLE, WRITE, at

from guestfault.softkvm.kvm_host import Request
from guestfault.softkvm.mmu_internal import RetPf
from guestfault.softkvm.page_track import (
    kvm_page_track_register_notifier,
    kvm_page_track_unregister_notifier,
    kvm_page_track_write,
    kvm_slot_page_track_add_page,
    kvm_slot_page_track_is_active,
    kvm_slot_page_track_remove_page,
)
from guestfault.uapi import kvm as uapi

UNTRACKED_BITS = 2 | 8  # PT_WRITABLE, SPTE_MMU_WRITABLE


def track(one, gfn=0):
    with one.stage.mmu_lock:
        return kvm_slot_page_track_add_page(one.kvm, one.kvm.memslots.slots[0], gfn)


def mapped(make, **options):
    one = make(**options)
    one.all_present()
    assert one.fault(0, WRITE) == RetPf.FIXED
    return one


def test_a_tracked_page_is_read_by_the_guest_and_written_by_kvm(make):
    one = mapped(make)
    assert track(one)  # TLBs to flush
    assert one.stage.sptes[0] == HVA | WRITABLE & ~UNTRACKED_BITS
    assert one.fault(0, WRITE | PRESENT) == RetPf.EMULATE
    one.stage.sptes.clear()
    assert one.fault(0) == RetPf.FIXED
    assert one.stage.sptes[0] == HVA | WRITABLE & ~UNTRACKED_BITS
    assert one.fault(1, WRITE) == RetPf.FIXED


def test_a_write_to_a_tracked_page_that_was_not_there_yet(make):
    """The processor says "not present": that it is tracked comes out when it is to be mapped."""
    one = make()
    one.all_present()
    track(one)
    assert one.fault(0, WRITE) == RetPf.EMULATE


def test_tracking_that_begins_in_the_middle_of_a_fault(make):
    """No write to a tracked frame goes unseen."""
    one = make()
    one.all_present()
    with at("direct_page_fault: take mmu_lock", lambda: track(one)):
        assert one.fault(0, WRITE) == RetPf.EMULATE
    assert 0 not in one.stage.sptes


def test_tracking_is_counted_and_its_end_makes_nothing_writable(make):
    one = mapped(make)
    slot = one.kvm.memslots.slots[0]
    track(one)
    track(one)
    kvm_slot_page_track_remove_page(slot, 0)
    assert kvm_slot_page_track_is_active(slot, 0)
    kvm_slot_page_track_remove_page(slot, 0)
    assert not kvm_slot_page_track_is_active(slot, 0)
    assert not one.stage.sptes[0] & 2
    assert one.fault(0, WRITE | PRESENT) == RetPf.FIXED
    assert one.stage.sptes[0] == HVA | WRITABLE
    kvm_slot_page_track_remove_page(slot, 0)  # of one that is not tracked: nothing


def test_a_page_protected_for_the_log_must_still_be_flushed(make):
    """Who protected it may not have flushed the TLBs yet."""
    one = mapped(make, flags=uapi.KVM_MEM_LOG_DIRTY_PAGES)
    with one.stage.mmu_lock:
        one.stage.sptes[0] &= ~2
    assert track(one)
    assert not track(one)


def test_no_slot_tracks_nothing(make):
    assert not kvm_slot_page_track_is_active(None, NPAGES)


class Listener:
    def __init__(self):
        self.writes, self.slots = [], []

    def track_write(self, vcpu, gpa, data):
        self.writes.append((gpa, data))

    def track_flush_slot(self, slot):
        self.slots.append(slot.id)


def test_who_listens_hears_of_writes_and_of_slots_that_go(make):
    one, listener = make(), Listener()
    kvm_page_track_register_notifier(one.kvm, listener)
    kvm_page_track_write(one.vcpu, 0x123, b"ab")
    one.slot(uapi.KVM_MEM_LOG_DIRTY_PAGES)
    assert listener.slots == []
    one.slot(npages=0)
    kvm_page_track_unregister_notifier(one.kvm, listener)
    kvm_page_track_write(one.vcpu, 0x124, b"c")
    assert (listener.writes, listener.slots) == ([(0x123, b"ab")], [0])


def test_tracking_stays_with_a_slot_that_changes_its_flags_only(make):
    one = mapped(make)
    track(one)
    one.slot(uapi.KVM_MEM_LOG_DIRTY_PAGES)
    assert kvm_slot_page_track_is_active(one.kvm.memslots.slots[0], 0)
    one.slot(gpa=0x10_0000)
    assert not kvm_slot_page_track_is_active(one.kvm.memslots.slots[0], 0x100)


def test_the_request_set_is_untouched_without_a_flush(make):
    one = mapped(make)
    track(one)
    assert Request.TLB_FLUSH not in one.vcpu.requests  # the caller's business
