import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.guest.layout import (
    GVA_OFFSET,
    MIN_MEMORY,
    PAGE_SIZE,
    REAL_MODE_LIMIT,
    Layout,
    LayoutError,
    Mode,
)


@given(st.sampled_from(Mode), st.integers(16, 5000), st.integers(1, 11))
def test_every_page_has_one_place(mode, pages, vcpus):
    layout = Layout(pages * PAGE_SIZE, mode, vcpus)
    shares = [layout.share(vcpu) for vcpu in range(vcpus)]
    placed = [layout.code, *layout.tables, *(page for share in shares for page in share)]
    assert placed == list(range(pages))
    sizes = {len(share) for share in shares}
    assert layout.largest_share == max(sizes) <= min(sizes) + 1
    assert layout.largest_share - 1 <= layout.index_mask < max(2 * layout.largest_share - 1, 1)


def test_tables_cover_what_is_mapped():
    # 1 PML4 and 1 PDPT; a PD for each GiB, a PT for each 2 MiB.
    assert len(Layout(MIN_MEMORY, Mode.LONG_CPL3).tables) == 4
    assert len(Layout((2 << 20) + PAGE_SIZE, Mode.LONG_CPL0).tables) == 5
    assert len(Layout((1 << 30) + PAGE_SIZE, Mode.LONG_CPL3).tables) == 2 + 2 + 513
    assert len(Layout(MIN_MEMORY, Mode.REAL).tables) == 0


def test_linear_addresses_differ_from_physical_ones_in_long_mode_only():
    assert Layout(MIN_MEMORY, Mode.LONG_CPL3).gva(0x5123) == GVA_OFFSET + 0x5123
    assert Layout(MIN_MEMORY, Mode.REAL).gva(0x5123) == 0x5123


@pytest.mark.parametrize(
    ("memory_size", "mode", "vcpus", "why"),
    [
        (MIN_MEMORY, Mode.REAL, 0, "at least one vCPU"),
        (MIN_MEMORY + 1, Mode.REAL, 1, "multiple of 4096"),
        (MIN_MEMORY - PAGE_SIZE, Mode.REAL, 1, "at least 65536 bytes"),
        (0, Mode.LONG_CPL3, 1, "at least 65536 bytes"),
        (-MIN_MEMORY, Mode.LONG_CPL3, 1, "at least 65536 bytes"),
        (MIN_MEMORY, Mode.LONG_CPL3, 12, "11 of 16 pages are left"),
        (MIN_MEMORY, Mode.REAL, 16, "15 of 16 pages are left"),
        (REAL_MODE_LIMIT + PAGE_SIZE, Mode.REAL, 1, "use a long-mode guest"),
    ],
)
def test_refuses_what_does_not_fit(memory_size, mode, vcpus, why):
    with pytest.raises(LayoutError, match=why) as caught:
        Layout(memory_size, mode, vcpus)
    assert (caught.value.memory_size, caught.value.vcpus) == (memory_size, vcpus)


def test_takes_the_extremes():
    assert len(Layout(MIN_MEMORY, Mode.LONG_CPL3, 11).share(10)) == 1
    assert Layout(REAL_MODE_LIMIT, Mode.REAL).pages == 3 << 18
