from __future__ import annotations

from guestfault.fault.locate.host_view import HostView
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.slots import MemorySlot, SlotMap


def test_reads_through_the_slots_and_believes_what_is_in() -> None:
    with GuestRam(4 * PAGE_SIZE) as ram:
        slots = SlotMap()
        # Two slots of one RAM, the second half of it first; and one of somebody else's memory.
        half, at = 2 * PAGE_SIZE, ram.guest.address
        slots.add(MemorySlot(0x10_0000, half, at + half, 0))
        slots.add(MemorySlot(0x20_0000, half, at, 1))
        slots.add(MemorySlot(0x30_0000, half, 0x1000, 2))
        for page in range(4):
            ram.bytes[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] = bytes([page + 1]) * PAGE_SIZE
        absent = {1}
        asked: list[int] = []

        def is_in(offset: int) -> bool:
            asked.append(offset)
            return offset // PAGE_SIZE not in absent

        for view in (HostView(slots, ram), HostView(slots, ram, is_in)):
            assert view.read(0x10_0010, 4) == b"\3\3\3\3"
            assert view.read_entry(0x10_1000, 4) == 0x0404_0404
            assert view.read_entry(0x20_0000, 8) == 0x0101_0101_0101_0101
            for nowhere in (0, 0x12_0000, 0x30_0000):
                assert view.read(nowhere, 8) is None
                assert view.read_entry(nowhere, 8) is None
                assert view.is_in(nowhere)
        assert HostView(slots, ram).read(0x20_1000, 1) == b"\2"
        assert view.read(0x20_1000, 1) is None
        assert view.read_entry(0x20_1000, 8) is None
        assert not view.is_in(0x20_1000)
        assert set(asked) <= set(range(4 * PAGE_SIZE))
