import itertools

import pytest

from guestfault.guest.boot import entry_state, initial_memory
from guestfault.guest.layout import PAGE_SIZE, Layout, Mode
from guestfault.guest.program import DONE_PORT, READY_PORT, RESULT_PORT, assemble
from guestfault.guest.walk import Walk
from guestfault.x86.paging import AccessKind, PagingState, Translation, walk

LONG_MODES = [Mode.LONG_CPL3, Mode.LONG_CPL0]


@pytest.mark.parametrize("mode", LONG_MODES)
def test_every_page_is_mapped_and_no_walk_writes(mode):
    layout = Layout((2 << 20) + 8 * PAGE_SIZE, mode)
    memory = initial_memory(layout, Walk.SEQUENTIAL, seed=0)
    sregs = entry_state(layout, 0).sregs
    state = PagingState(sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer)

    def read_entry(gpa, size):
        assert gpa // PAGE_SIZE in layout.tables
        return int.from_bytes(memory[gpa : gpa + size], "little")

    for page, kind in itertools.product(range(layout.pages), AccessKind):
        gpa = page * PAGE_SIZE + 0x123
        result = walk(state, layout.gva(gpa), kind, mode.cpl == 3, read_entry)
        assert isinstance(result, Translation)
        assert result.gpa == gpa
        assert not result.updates


def test_no_page_is_mapped_at_its_physical_address():
    layout = Layout(16 * PAGE_SIZE, Mode.LONG_CPL3)
    memory = initial_memory(layout, Walk.SEQUENTIAL, seed=0)
    sregs = entry_state(layout, 0).sregs
    state = PagingState(sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer)
    for page in range(layout.pages):
        result = walk(
            state,
            page * PAGE_SIZE,
            AccessKind.READ,
            True,
            lambda gpa, size: int.from_bytes(memory[gpa : gpa + size], "little"),
        )
        assert not isinstance(result, Translation)


@pytest.mark.parametrize("mode", LONG_MODES)
@pytest.mark.parametrize("port", [READY_PORT, RESULT_PORT, DONE_PORT])
def test_the_tss_lets_every_port_pass(mode, port):
    layout = Layout(16 * PAGE_SIZE, mode)
    memory = initial_memory(layout, Walk.ZIPF, seed=0)
    task = entry_state(layout, 0).sregs.tr
    start = task.base - layout.gva(0)
    tss = memory[start : start + task.limit + 1]
    assert start // PAGE_SIZE == (start + task.limit) // PAGE_SIZE == layout.code
    assert len(assemble(layout, Walk.ZIPF)) <= start % PAGE_SIZE
    bitmap = tss[int.from_bytes(tss[102:104], "little") :]
    # A processor reads two bytes, in case a wide access crosses from one into the next.
    assert int.from_bytes(bitmap[port // 8 :][:2], "little") >> port % 8 & 0b1111 == 0
    assert bitmap[-1] == 0xFF


@pytest.mark.parametrize("mode", Mode)
def test_vcpus_differ_in_their_parameters_only(mode):
    layout = Layout(40 * PAGE_SIZE, mode, vcpus=2)
    one, two = entry_state(layout, 0), entry_state(layout, 1)
    differing = {
        name for name, _ in one.regs._fields_ if getattr(one.regs, name) != getattr(two.regs, name)
    }
    assert {"rsi", "rbx"} <= differing <= {"rsi", "rbx", "rbp"}
    one.sregs.apic_base = two.sregs.apic_base  # one of them is the bootstrap processor
    assert bytes(one.sregs) == bytes(two.sregs)


def test_levels_and_segments():
    cpl3, cpl0, real = (
        entry_state(Layout(16 * PAGE_SIZE, mode), 0)
        for mode in (Mode.LONG_CPL3, Mode.LONG_CPL0, Mode.REAL)
    )
    assert (cpl3.sregs.ss.dpl, cpl3.regs.rflags) == (3, 0x3002)
    assert (cpl0.sregs.ss.dpl, cpl0.regs.rflags) == (0, 0x2)
    assert (real.sregs.cr0 & 1, real.sregs.ds.limit, real.sregs.ds.base) == (0, 0xFFFF_FFFF, 0)


def test_seeds_decide_the_data_and_nothing_else():
    layout = Layout(16 * PAGE_SIZE, Mode.LONG_CPL3)
    one, again, other = (initial_memory(layout, Walk.RANDOM, seed) for seed in (1, 1, 2))
    data = layout.header_pages * PAGE_SIZE
    assert one == again
    assert one[:data] == other[:data]
    assert one[data:] != other[data:]
