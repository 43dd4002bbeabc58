"""The second-stage table: what an invalidation takes away, and when a fault must look again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guestfault.softkvm.memslots import KvmMemorySlot, Memslots
from guestfault.softkvm.second_stage import PAGE_SIZE, PT_READ, SecondStage

BASE, HVA, PAGES = 0x100, 0x7F00_0000_0000, 16
SLOT = KvmMemorySlot(0, BASE, PAGES, HVA, 0)
SLOTS = Memslots().replaced(None, SLOT)


def full() -> SecondStage:
    stage = SecondStage()
    stage.sptes.update({gfn: SLOT.hva_of_gfn(gfn) | PT_READ for gfn in range(BASE, BASE + PAGES)})
    return stage


@given(
    st.integers(-3 * PAGE_SIZE, (PAGES + 3) * PAGE_SIZE),
    st.integers(1, (PAGES + 6) * PAGE_SIZE),
)
def test_exactly_the_entries_that_map_a_byte_of_the_range_go(start: int, size: int) -> None:
    stage = full()
    zapped = stage.invalidate_range_start(SLOTS, HVA + start, HVA + start + size)
    kept = {
        gfn
        for gfn in range(BASE, BASE + PAGES)
        if (gfn - BASE + 1) * PAGE_SIZE <= start or (gfn - BASE) * PAGE_SIZE >= start + size
    }
    assert set(stage.sptes) == kept
    assert zapped is (len(kept) < PAGES)


def test_a_fault_retries_from_the_start_of_an_invalidation_to_after_its_end() -> None:
    stage = full()
    seq = stage.mmu_invalidate_seq
    assert not stage.mmu_invalidate_retry(seq)
    stage.invalidate_range_start(SLOTS, HVA, HVA + PAGE_SIZE)
    assert stage.mmu_invalidate_retry(seq)
    assert stage.mmu_invalidate_retry(stage.mmu_invalidate_seq)
    stage.invalidate_range_start(SLOTS, HVA, HVA + PAGE_SIZE)
    stage.invalidate_range_end()
    assert stage.mmu_invalidate_retry(stage.mmu_invalidate_seq)  # one is still under way
    stage.invalidate_range_end()
    assert stage.mmu_invalidate_retry(seq)
    assert not stage.mmu_invalidate_retry(stage.mmu_invalidate_seq)


def test_a_slot_that_goes_takes_its_entries_and_makes_faults_look_again() -> None:
    stage = full()
    stage.sptes[0x900] = 0x1000 | PT_READ  # of another slot
    seq = stage.mmu_invalidate_seq
    stage.zap_memslot(SLOT)
    assert set(stage.sptes) == {0x900}
    assert stage.mmu_invalidate_retry(seq)
