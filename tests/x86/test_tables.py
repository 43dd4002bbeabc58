"""Tables built and walked again: every page comes back, with its rights, and nothing else does."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestfault.x86.paging import AccessKind, PageFault, Translation, walk
from guestfault.x86.tables import (
    SIZE_1G,
    SIZE_2M,
    SIZE_4K,
    SIZE_4M,
    Mapping,
    MappingError,
    PagingMode,
    TableBuilder,
    table_pages_needed,
)

READ = AccessKind.READ
MODES = [mode for mode in PagingMode if mode is not PagingMode.NONE]
ROOT = 0x20_0000


@st.composite
def mappings(draw: st.DrawFn, mode: PagingMode) -> list[Mapping]:
    """Mappings that cannot overlap: each keeps to a slot of its own, twice the largest page."""
    slot = 2 * mode.page_sizes[-1]
    half = 1 << mode.linear_bits - 1
    starts = range(0, half, slot) if mode.linear_bits > 32 else range(0, 1 << 32, slot)
    chosen = draw(st.lists(st.integers(0, len(starts) - 1), min_size=1, max_size=5, unique=True))
    result = []
    for index in chosen:
        base = starts[index]
        if mode.linear_bits > 32 and draw(st.booleans()):
            base += (1 << 64) - half  # the upper canonical half
        size = draw(st.sampled_from(mode.page_sizes))
        pages = draw(st.integers(1, min(6, slot // size)))
        first = draw(st.integers(0, slot // size - pages))
        width = 32 if mode is PagingMode.BITS32 and size == SIZE_4K else 40
        frame = draw(st.integers(0, (1 << width) // size - pages))
        result.append(
            Mapping(
                gva=base + first * size,
                gpa=frame * size,
                length=pages * size,
                page_size=size,
                writable=draw(st.booleans()),
                user=draw(st.booleans()),
                executable=mode is PagingMode.BITS32 or draw(st.booleans()),
            )
        )
    return result


@settings(max_examples=60, deadline=None)
@pytest.mark.parametrize("mode", MODES)
@given(data=st.data())
def test_every_mapped_page_comes_back(mode: PagingMode, data: st.DataObject):
    wanted = data.draw(mappings(mode))
    tables = TableBuilder(mode, ROOT)
    for mapping in wanted:
        tables.map(mapping)
    assert tables.table_pages == table_pages_needed(mode, wanted)
    assert len(tables.image()) == tables.table_pages * SIZE_4K
    mapped = set()
    for mapping in wanted:
        for offset in range(0, mapping.length, mapping.page_size):
            inside = data.draw(st.integers(0, mapping.page_size - 1))
            gva = mapping.gva + offset + inside
            result = walk(tables.state, gva, READ, mapping.user, tables.read_entry)
            assert isinstance(result, Translation)
            assert result.gpa == mapping.gpa + offset + inside
            assert result.page_size == mapping.page_size
            rights = (result.writable, result.user, result.executable)
            assert rights == (mapping.writable, mapping.user, mapping.executable)
            assert result.updates == ()
            assert result.dirty
            mapped.add((mapping.gva + offset, mapping.page_size))
    for mapping in wanted:
        for gva in (mapping.gva - 1, mapping.gva + mapping.length):
            if not 0 <= gva < 1 << 64 or any(at <= gva < at + size for at, size in mapped):
                continue
            assert not isinstance(
                walk(tables.state, gva, READ, False, tables.read_entry), Translation
            )


@pytest.mark.parametrize("mode", MODES)
def test_tables_lie_one_after_another_from_the_root(mode: PagingMode):
    tables = TableBuilder(mode, ROOT)
    tables.map(Mapping(0x1000, 0x5000, SIZE_4K))
    result = walk(tables.state, 0x1000, READ, False, tables.read_entry)
    assert isinstance(result, Translation)
    assert tables.cr3 == ROOT
    at = [gpa & ~0xFFF for gpa, _, _ in result.entries]
    assert sorted(at) == [ROOT + page * SIZE_4K for page in range(mode.levels)]
    image = tables.image()
    for gpa, value, _ in result.entries:
        start = gpa - ROOT
        assert int.from_bytes(image[start : start + mode.entry_size], "little") == value


@pytest.mark.parametrize("mode", MODES)
def test_a_mapping_goes_on_in_the_next_table(mode: PagingMode):
    tables = TableBuilder(mode, ROOT)
    border = 1 << mode.shift(3 if mode.levels > 2 else 2)
    tables.map(Mapping(border - 3 * SIZE_4K, 0x8000, 6 * SIZE_4K))
    for page in range(6):
        gva = border + (page - 3) * SIZE_4K
        result = walk(tables.state, gva, READ, False, tables.read_entry)
        assert isinstance(result, Translation)
        assert result.gpa == 0x8000 + page * SIZE_4K
    after = walk(tables.state, border + 3 * SIZE_4K, READ, False, tables.read_entry)
    assert isinstance(after, PageFault)


def test_state_is_the_mode_asked_for():
    for mode in MODES:
        assert TableBuilder(mode, ROOT).state.mode is mode


def test_nothing_is_mapped_at_first():
    for mode in MODES:
        tables = TableBuilder(mode, ROOT)
        assert isinstance(walk(tables.state, 0, READ, False, tables.read_entry), PageFault)
        assert table_pages_needed(mode, []) == tables.table_pages == 1


FOUR, B32, PAE = PagingMode.FOUR_LEVEL, PagingMode.BITS32, PagingMode.PAE


@pytest.mark.parametrize(
    ("mode", "mapping", "why"),
    [
        (FOUR, Mapping(0, 0, SIZE_4M, page_size=SIZE_4M), "pages of"),
        (PAE, Mapping(0, 0, SIZE_1G, page_size=SIZE_1G), "pages of"),
        (FOUR, Mapping(0x800, 0, SIZE_4K), "aligned"),
        (FOUR, Mapping(0, 0, SIZE_4K + 1), "aligned"),
        (FOUR, Mapping(0, SIZE_4K, SIZE_2M, page_size=SIZE_2M), "aligned"),
        (FOUR, Mapping(0, 0, 0), "aligned"),
        (FOUR, Mapping(0x7FFF_FFFF_F000, 0, 2 * SIZE_4K), "linear addresses"),
        (FOUR, Mapping(1 << 50, 0, SIZE_4K), "linear addresses"),
        (B32, Mapping(0xFFFF_F000, 0, 2 * SIZE_4K), "linear addresses"),
        (FOUR, Mapping(0, 1 << 52, SIZE_4K), "52 bits"),
        (B32, Mapping(0, 1 << 32, SIZE_4K), "32 bits"),
        (B32, Mapping(0, 1 << 40, SIZE_4M, page_size=SIZE_4M), "40 bits"),
        (B32, Mapping(0, 0, SIZE_4K, executable=False), "execute-disable"),
    ],
)
def test_mappings_that_cannot_be(mode: PagingMode, mapping: Mapping, why: str):
    with pytest.raises(MappingError, match=why) as caught:
        TableBuilder(mode, ROOT).map(mapping)
    assert caught.value.mapping == mapping
    with pytest.raises(MappingError, match=why):
        table_pages_needed(mode, [mapping])


@pytest.mark.parametrize(
    ("first", "second"),
    [
        (Mapping(0, 0, 4 * SIZE_4K), Mapping(3 * SIZE_4K, 0, SIZE_4K)),
        (Mapping(0, 0, SIZE_2M, page_size=SIZE_2M), Mapping(SIZE_4K, 0, SIZE_4K)),
        (Mapping(SIZE_4K, 0, SIZE_4K), Mapping(0, 0, SIZE_2M, page_size=SIZE_2M)),
    ],
)
def test_overlap_is_refused(first: Mapping, second: Mapping):
    tables = TableBuilder(FOUR, ROOT)
    tables.map(first)
    with pytest.raises(MappingError) as caught:
        tables.map(second)
    assert caught.value.mapping == second


def test_tables_may_not_pass_4_gib_outside_long_mode():
    tables = TableBuilder(PAE, 0xFFFF_E000)
    with pytest.raises(MappingError, match="0x100000000"):
        tables.map(Mapping(0, 0, SIZE_4K))
    for mode, root in [(B32, 1 << 32), (FOUR, 0x1800), (FOUR, 1 << 52), (PagingMode.NONE, 0)]:
        with pytest.raises(ValueError, match="table"):
            TableBuilder(mode, root)
