"""Write permission given back without the lock, and who may come in between."""

from tests.softkvm.modelled_mm import HVA, PRESENT, PROTECTED, WRITABLE, WRITE, at

from guestfault.softkvm.mmu_internal import RetPf
from guestfault.softkvm.page_track import kvm_slot_page_track_add_page
from guestfault.uapi import kvm as uapi

LOGGED = uapi.KVM_MEM_LOG_DIRTY_PAGES
CMPXCHG = "fast_pf_fix_direct_spte: cmpxchg the SPTE"


def logged(make):
    """A logged slot, its page 0 mapped and not writable."""
    one = make(flags=LOGGED)
    one.all_present()
    assert one.fault(0) == RetPf.FIXED
    one.mm.fast.clear()
    return one


def test_a_logged_page_is_made_writable_without_a_look_at_it(make):
    one = logged(make)
    assert one.fault(0, WRITE | PRESENT) == RetPf.FIXED
    assert one.stage.sptes[0] == HVA | WRITABLE
    assert (one.mm.fast, one.mm.slow) == ([], [])
    assert one.vcpu.stat.pf_fast == 1
    assert one.vm.get_dirty_log(0)[0] == 1
    assert one.stage.sptes[0] == HVA | PROTECTED


def test_there_may_be_nothing_left_to_fix(make):
    one = logged(make)
    one.fault(0, WRITE | PRESENT)
    assert one.fault(0, WRITE | PRESENT) == RetPf.SPURIOUS


def test_what_the_host_maps_read_only_takes_the_long_way(make):
    """Copy-on-write, for one: only GUP can make it writable."""
    one = make()
    one.mm.present = {HVA}
    assert one.fault(0) == RetPf.FIXED
    assert one.fault(0, WRITE | PRESENT) == RetPf.FIXED
    assert one.mm.slow[-1] == (HVA, True)
    assert one.vcpu.stat.pf_fast == 0


def test_a_page_zapped_before_the_exchange_is_not_brought_back(make):
    """No entry comes back for a page that the host has taken away."""
    one = logged(make)
    with at(CMPXCHG, one.invalidate):
        assert one.fault(0, WRITE | PRESENT) == RetPf.RETRY
    assert one.stage.sptes == {}
    assert one.vcpu.stat.pf_fast == 0


def test_another_vcpu_that_was_faster(make):
    one = logged(make)
    with at(CMPXCHG, lambda: one.fault(0, WRITE | PRESENT)):
        assert one.fault(0, WRITE | PRESENT) == RetPf.SPURIOUS
    assert one.vcpu.stat.pf_fast == 1


def test_a_page_tracked_before_the_exchange_stays_protected(make):
    """No write to a tracked frame goes unseen."""
    one = logged(make)

    def track():
        with one.stage.mmu_lock:
            assert kvm_slot_page_track_add_page(one.kvm, one.kvm.memslots.slots[0], 0)

    with at(CMPXCHG, track):
        assert one.fault(0, WRITE | PRESENT) == RetPf.EMULATE
    assert not one.stage.sptes[0] & 2


def test_a_log_taken_between_exchange_and_mark_loses_no_write(make):
    """The page is in the next log, and the guest has not written to it yet."""
    one = logged(make)
    logs = []
    with at(
        "fast_pf_fix_direct_spte: find the slot", lambda: logs.append(one.vm.get_dirty_log(0)[0])
    ):
        assert one.fault(0, WRITE | PRESENT) == RetPf.FIXED
    assert logs == [0]
    assert one.vm.get_dirty_log(0)[0] == 1


def test_a_log_that_begins_after_the_slot_was_looked_up(make):
    """Every write to a page after the log began is in it: also by way of the old slot."""
    one = make()
    one.all_present()
    assert one.fault(0) == RetPf.FIXED
    with at("fast_page_fault: read the SPTE", lambda: one.slot(LOGGED)):
        assert one.fault(0, WRITE | PRESENT) == RetPf.FIXED
    assert one.vm.get_dirty_log(0)[0] == 1


def test_who_loses_the_exchange_too_often_takes_the_long_way(make):
    one = logged(make)
    one.stage.cmpxchg = lambda *_: False
    assert one.fault(0, WRITE | PRESENT) == RetPf.FIXED
    assert (HVA, True) in one.mm.fast
    assert one.vcpu.stat.pf_fast == 0
