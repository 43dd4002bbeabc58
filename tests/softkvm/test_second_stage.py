"""The second-stage table: what an invalidation takes away, and when a fault must look again."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guestfault.softkvm.memslots import KvmMemorySlot, Memslots
from guestfault.softkvm.second_stage import (
    PAGE_SIZE,
    PT_READ,
    PT_WRITABLE,
    SPTE_HOST_WRITABLE,
    SPTE_MMU_WRITABLE,
    SecondStage,
    is_mmio_spte,
    make_mmio_spte,
    mmio_spte_generation,
)

BASE, HVA, PAGES = 0x100, 0x7F00_0000_0000, 16
SLOT = KvmMemorySlot(0, BASE, PAGES, HVA, 0)
SLOTS = Memslots().replaced(None, SLOT)
GFN = BASE


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
    assert not stage.mmu_invalidate_retry(seq, HVA, GFN)
    stage.invalidate_range_start(SLOTS, HVA, HVA + PAGE_SIZE)
    assert stage.mmu_invalidate_retry(seq, HVA, GFN)
    assert not stage.mmu_invalidate_retry(seq, HVA + PAGE_SIZE, GFN)
    stage.invalidate_range_start(SLOTS, HVA + 2 * PAGE_SIZE, HVA + 3 * PAGE_SIZE)
    stage.invalidate_range_end()
    seq = stage.mmu_invalidate_seq
    for page in range(3):  # one is still under way, and only the hull of both is known
        assert stage.mmu_invalidate_retry(seq, HVA + page * PAGE_SIZE, GFN)
    assert not stage.mmu_invalidate_retry(seq, HVA + 3 * PAGE_SIZE, GFN)
    stage.invalidate_range_end()
    assert stage.mmu_invalidate_retry(seq, HVA, GFN)
    assert not stage.mmu_invalidate_retry(stage.mmu_invalidate_seq, HVA, GFN)


def test_a_fault_in_the_middle_of_a_page_that_is_partly_taken_retries() -> None:
    stage = full()
    stage.invalidate_range_start(SLOTS, HVA + 0x800, HVA + 0x801)
    assert stage.mmu_invalidate_retry(stage.mmu_invalidate_seq, HVA, GFN)
    assert BASE not in stage.sptes


def test_frames_are_held_off_by_their_number_as_well() -> None:
    stage = full()
    first, later = (range(BASE, BASE + 2),), (range(BASE + 8, BASE + 9),)
    assert stage.kvm_mmu_invalidate_begin(first)
    assert set(stage.sptes) == set(range(BASE + 2, BASE + PAGES))
    assert not stage.kvm_mmu_invalidate_begin((range(BASE, BASE + 1),))  # gone already
    stage.kvm_mmu_invalidate_end((range(BASE, BASE + 1),))
    seq = stage.mmu_invalidate_seq
    assert stage.mmu_invalidate_retry(seq, HVA, BASE + 1)
    assert not stage.mmu_invalidate_retry(seq, HVA, BASE + 2)  # wherever the host has it
    # Together with a host range, which is not stretched to an address that nobody named.
    stage.invalidate_range_start(SLOTS, HVA + 4 * PAGE_SIZE, HVA + 5 * PAGE_SIZE)
    assert stage.mmu_invalidate_retry(seq, HVA + 4 * PAGE_SIZE, BASE + 4)
    assert not stage.mmu_invalidate_retry(seq, HVA + 3 * PAGE_SIZE, BASE + 3)
    stage.kvm_mmu_invalidate_begin(later)
    stage.kvm_mmu_invalidate_end(first)
    seq = stage.mmu_invalidate_seq
    assert not stage.mmu_invalidate_retry(seq, HVA, BASE + 1)
    assert stage.mmu_invalidate_retry(seq, HVA, BASE + 8)
    stage.invalidate_range_end()
    stage.kvm_mmu_invalidate_end(later)
    assert stage.mmu_invalidate_retry(seq, HVA, BASE + 8)
    assert not stage.mmu_invalidate_retry(stage.mmu_invalidate_seq, HVA, BASE + 8)


def test_a_slot_that_goes_takes_its_entries_and_makes_faults_look_again() -> None:
    stage = full()
    stage.sptes[0x900] = 0x1000 | PT_READ  # of another slot
    seq = stage.mmu_invalidate_seq
    stage.zap_memslot(SLOT)
    assert set(stage.sptes) == {0x900}
    assert stage.mmu_invalidate_retry(seq, HVA, GFN)


def test_an_mmio_entry_is_none_for_memory_and_keeps_its_generation() -> None:
    spte = make_mmio_spte(77)
    assert is_mmio_spte(spte)
    assert mmio_spte_generation(spte) == 77
    assert not spte & (PT_READ | PT_WRITABLE)
    assert not is_mmio_spte(HVA | PT_READ | PT_WRITABLE | SPTE_HOST_WRITABLE | SPTE_MMU_WRITABLE)


@given(st.sets(st.integers(0, PAGES - 1)), st.sets(st.integers(0, PAGES - 1)))
def test_a_log_protects_what_is_in_it_and_no_more(dirty: set[int], mapped: set[int]) -> None:
    stage, slot = SecondStage(), KvmMemorySlot(0, BASE, PAGES, HVA, 0, bytearray(8))
    for page in dirty:
        slot.mark_page_dirty(BASE + page)
    stage.sptes.update({BASE + page: slot.hva_of_gfn(BASE + page) | 3 for page in mapped})
    log, flush = stage.get_dirty_log(slot)
    assert {
        8 * i + bit for i, byte in enumerate(log) for bit in range(8) if byte >> bit & 1
    } == dirty
    assert not any(slot.dirty_bitmap)
    assert {gfn - BASE for gfn, spte in stage.sptes.items() if not spte & 2} == dirty & mapped
    assert flush is bool(dirty & mapped)


def test_compare_and_exchange() -> None:
    stage = full()
    old = stage.sptes[BASE]
    assert not stage.cmpxchg(BASE, old | 2, 0)
    assert stage.cmpxchg(BASE, old, old | 2)
    assert stage.sptes[BASE] == old | 2
    del stage.sptes[BASE]
    assert not stage.cmpxchg(BASE, old | 2, old)
    assert BASE not in stage.sptes
