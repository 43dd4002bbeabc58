"""Slots: what may be added, and addresses there and back, against sets of pages."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.memory.slots import MemorySlot, SlotError, SlotMap

PAGE = 4096
slots = st.lists(
    st.builds(
        lambda gpa, pages, hva, slot: MemorySlot(gpa * PAGE, pages * PAGE, hva << 20, slot),
        st.integers(0, 30),
        st.integers(1, 6),
        st.integers(1, 99),
        st.integers(0, 6),
    ),
    max_size=12,
)


@given(slots)
def test_any_slots(asked):
    kept, slot_map = [], SlotMap()
    for slot in asked:
        pages = set(range(slot.gpa, slot.end, PAGE))
        rival = [s for s in kept if s.slot == slot.slot or pages & set(range(s.gpa, s.end, PAGE))]
        if rival:
            with pytest.raises(SlotError) as caught:
                slot_map.add(slot)
            assert caught.value.slot is slot
            assert caught.value.other in rival
        else:
            slot_map.add(slot)
            kept.append(slot)
    assert list(slot_map) == sorted(kept)
    for gpa in range(0, 40 * PAGE, PAGE // 2):
        holder = next((s for s in kept if s.gpa <= gpa < s.end), None)
        assert slot_map.find(gpa) == holder
        hva = slot_map.gpa_to_hva(gpa)
        assert hva == (None if holder is None else holder.hva + gpa - holder.gpa)
        if hva is not None and sum(s.hva <= hva < s.hva + s.size for s in kept) == 1:
            assert slot_map.hva_to_gpa(hva) == gpa


@pytest.mark.parametrize(
    ("slot", "why"),
    [
        (MemorySlot(0x800, PAGE, PAGE, 0), "gpa 0x800"),
        (MemorySlot(0, 0x1800, PAGE, 0), "size 0x1800"),
        (MemorySlot(0, PAGE, 0x1001, 0), "hva 0x1001"),
        (MemorySlot(0, 0, PAGE, 0), "not positive"),
        (MemorySlot((1 << 52) - PAGE, 2 * PAGE, PAGE, 0), "not below"),
    ],
)
def test_the_number_that_is_wrong_is_named(slot, why):
    with pytest.raises(SlotError, match=why) as caught:
        SlotMap().add(slot)
    assert caught.value.other is None


def test_a_host_address_that_backs_nothing():
    slot_map = SlotMap()
    slot_map.add(MemorySlot(0x1000, PAGE, 0x7000_0000, 0))
    assert slot_map.hva_to_gpa(0x7000_0FFF) == 0x1FFF
    assert slot_map.hva_to_gpa(0x7000_1000) is None
