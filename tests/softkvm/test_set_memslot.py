"""One list of slots after another, and what is taken back on the way."""

import pytest
from tests.softkvm.modelled_mm import HVA, NPAGES, PROTECTED, WRITE, At, scheduled_by

from guestfault.softkvm.memslots import KVM_MEMSLOT_INVALID
from guestfault.softkvm.mmu_internal import RetPf
from guestfault.uapi import kvm as uapi

LOGGED, ABSENT_FLAG = uapi.KVM_MEM_LOG_DIRTY_PAGES, 1 << 2
PUBLISH = "kvm_swap_active_memslots: publish the slots"


def watched(one, request):
    """The points that a request passes, and the flags of slot 0 when the zap begins."""
    flags = []
    scheduler = At()
    scheduler.happens["zap_memslot: take mmu_lock"] = lambda: flags.append(
        one.kvm.memslots.slots[0].flags
    )
    with scheduled_by(scheduler):
        request()
    names = [name for name in scheduler.seen if name.startswith(("kvm_swap", "zap", "kvm_mmu"))]
    return names, flags


def mapped(make):
    one = make()
    one.all_present()
    assert one.fault(0, WRITE) == RetPf.FIXED
    return one


@pytest.mark.parametrize("how", ["delete", "move"])
def test_a_slot_that_goes_is_invalid_until_it_is_zapped(make, how):
    one = mapped(make)
    before = one.kvm.memslots.generation
    request = (lambda: one.slot(npages=0)) if how == "delete" else (lambda: one.slot(gpa=0x10_0000))
    names, flags = watched(one, request)
    assert names == [PUBLISH, "zap_memslot: take mmu_lock", PUBLISH]
    assert flags == [KVM_MEMSLOT_INVALID]
    assert one.stage.sptes == {}
    assert one.kvm.memslots.generation == before + 2
    assert [s.flags for s in one.kvm.memslots.slots] == ([] if how == "delete" else [0])


def test_a_new_slot_zaps_nothing(make):
    one = mapped(make)
    names, _ = watched(one, lambda: one.vm.set_user_memory_region(1, 1 << 30, 0x1000, HVA))
    assert names == [PUBLISH]
    assert 0 in one.stage.sptes


def test_a_log_that_begins_write_protects_what_is_mapped(make):
    one = mapped(make)
    names, _ = watched(one, lambda: one.slot(LOGGED))
    assert names == [PUBLISH, "kvm_mmu_slot_remove_write_access: take mmu_lock"]
    assert one.stage.sptes == {0: HVA | PROTECTED}


@pytest.mark.parametrize(("before", "after"), [(LOGGED, 0), (0, ABSENT_FLAG)])
def test_other_flags_leave_what_is_mapped_alone(make, before, after):
    one = make(flags=before)
    one.all_present()
    one.fault(0, WRITE)
    names, _ = watched(one, lambda: one.slot(after))
    assert names == [PUBLISH]
    assert 0 in one.stage.sptes


def test_a_moved_slot_is_found_where_it_is(make):
    one = mapped(make)
    one.slot(gpa=0x10_0000)
    assert one.fault(0) == RetPf.EMULATE
    assert one.fault(0x100 + NPAGES - 1) == RetPf.FIXED


@pytest.mark.timeout(30)
def test_an_invalidation_ends_on_the_slots_that_it_began_with(make, background):
    """No list is published between the start of an invalidation and the end of the last one."""
    one = mapped(make)
    for _ in range(2):
        one.vm.invalidate_range_start(HVA, HVA + 0x1000)
    before = one.kvm.memslots
    change = background(lambda: one.slot(npages=0))
    for _ in range(2):
        change.thread.join(0.05)
        assert change.thread.is_alive()
        assert one.kvm.memslots is before
        one.vm.invalidate_range_end(HVA, HVA + 0x1000)
    change.result()
    assert one.kvm.memslots.slots == ()


@pytest.mark.timeout(30)
def test_invalidations_and_changes_of_slots_do_not_wait_for_each_other_for_ever(make, background):
    """Neither holds what the other waits for."""
    one = mapped(make)

    def invalidate():
        for _ in range(300):
            one.invalidate()

    runs = [background(invalidate) for _ in range(2)]
    for _ in range(100):
        one.slot(npages=0)
        one.slot()
    for run in runs:
        run.result()
    assert one.kvm.mn_active_invalidate_count == 0
    assert one.stage.mmu_invalidate_in_progress == 0
