"""Reserved bits and geometry, against masks copied by hand from the manual's entry formats."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.x86.entries import (
    SIZE_4M,
    PagingMode,
    level_formats,
    pse36_base,
    pse36_entry,
)

NX = 1 << 63


def bits(*ranges: tuple[int, int]) -> int:
    """``(high, low)`` ranges as the manual writes them."""
    return sum(1 << bit for high, low in ranges for bit in range(low, high + 1))


# mode, level, maxphyaddr -> reserved in an entry for a page, reserved in an entry for a table.
# None: the level has no such entries.  NXE is set, 1 GiB pages and PSE are there.
RESERVED = [
    (PagingMode.FOUR_LEVEL, 1, 46, bits((51, 46)), None),
    (PagingMode.FOUR_LEVEL, 2, 46, bits((51, 46), (20, 13)), bits((51, 46))),
    (PagingMode.FOUR_LEVEL, 3, 46, bits((51, 46), (29, 13)), bits((51, 46))),
    (PagingMode.FOUR_LEVEL, 4, 46, None, bits((51, 46), (7, 7))),
    (PagingMode.FOUR_LEVEL, 4, 52, None, bits((7, 7))),
    (PagingMode.FIVE_LEVEL, 4, 52, None, bits((7, 7))),
    (PagingMode.FIVE_LEVEL, 5, 40, None, bits((51, 40), (7, 7))),
    (PagingMode.PAE, 1, 36, bits((62, 36)), None),
    (PagingMode.PAE, 2, 36, bits((62, 36), (20, 13)), bits((62, 36))),
    (PagingMode.PAE, 3, 36, None, bits((63, 36), (8, 5), (2, 1))),
    (PagingMode.BITS32, 1, 36, 0, None),
    (PagingMode.BITS32, 2, 40, bits((21, 21)), 0),
    (PagingMode.BITS32, 2, 52, bits((21, 21)), 0),
    (PagingMode.BITS32, 2, 36, bits((21, 17)), 0),
    (PagingMode.BITS32, 2, 32, bits((21, 13)), 0),
]


@pytest.mark.parametrize(("mode", "level", "maxphyaddr", "leaf", "table"), RESERVED)
def test_reserved_bits(mode: PagingMode, level: int, maxphyaddr: int, leaf, table):
    entry = level_formats(mode, maxphyaddr, nxe=True, pse=True, gbpages=True)[level]
    assert bool(entry.leaf) == (leaf is not None)
    if leaf is not None:
        assert entry.reserved_leaf == leaf
    if table is not None:
        assert entry.reserved_table == table


@pytest.mark.parametrize("mode", [PagingMode.PAE, PagingMode.FOUR_LEVEL, PagingMode.FIVE_LEVEL])
def test_without_nxe_the_nx_bit_is_reserved(mode: PagingMode):
    for entry in level_formats(mode, 52, nxe=False, pse=False, gbpages=True)[1:]:
        assert not entry.leaf or entry.reserved_leaf & NX
        assert entry.shift == 12 or entry.reserved_table & NX


def test_without_gbpages_ps_is_reserved_in_a_pdpte():
    pdpte = level_formats(PagingMode.FOUR_LEVEL, 52, nxe=True, pse=False, gbpages=False)[3]
    assert pdpte.leaf == 0
    assert pdpte.reserved_table == 1 << 7


def test_without_pse_ps_is_ignored():
    pde = level_formats(PagingMode.BITS32, 52, nxe=False, pse=False, gbpages=False)[2]
    assert (pde.leaf, pde.reserved_table) == (0, 0)


def test_geometry():
    assert [mode.levels for mode in PagingMode] == [0, 2, 3, 4, 5]
    assert [mode.entry_size for mode in PagingMode] == [0, 4, 8, 8, 8]
    assert [PagingMode.BITS32.shift(level) for level in (1, 2)] == [12, 22]
    assert [PagingMode.FIVE_LEVEL.shift(level) for level in range(1, 6)] == [12, 21, 30, 39, 48]
    for mode in PagingMode:
        sizes = [1 << mode.shift(level + 1) for level in range(len(mode.page_sizes))]
        assert list(mode.page_sizes) == sizes


@given(st.integers(0, (1 << 18) - 1).map(lambda page: page * SIZE_4M))
def test_pse36_round_trip(base: int):
    entry = pse36_entry(base)
    assert pse36_base(entry) == base
    assert entry < 1 << 32
    assert entry & (bits((12, 0)) | 1 << 21) == 0
