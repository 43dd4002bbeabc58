"""The walk: rights, error codes, accessed and dirty flags, and what no bytes may make it do."""

import itertools
import random
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestfault.x86.entries import (
    PT64_NX_MASK,
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
)
from guestfault.x86.paging import (
    AccessKind,
    EntryUnreadable,
    NonCanonical,
    PageFault,
    PagingMode,
    PagingState,
    Translation,
    walk,
    walk_from,
)
from guestfault.x86.registers import CR0_WP, CR4_SMAP, CR4_SMEP, EFER_NXE
from guestfault.x86.tables import (
    SIZE_1G,
    SIZE_2M,
    SIZE_4K,
    SIZE_4M,
    Mapping,
    TableBuilder,
)

READ, WRITE, FETCH, _ = AccessKind
MODES = [mode for mode in PagingMode if mode is not PagingMode.NONE]
P, W, U, RSVD, I = 1, 2, 4, 8, 16  # noqa: E741 - the manual's letters for the error code
GVA, GPA = 0x40_3000, 0x7000
ROOT = 0x10_0000


def one_page(mode: PagingMode, **rights: bool) -> TableBuilder:
    """Tables that map GVA to GPA and nothing else."""
    tables = TableBuilder(mode, ROOT)
    tables.map(Mapping(GVA, GPA, SIZE_4K, **rights))
    return tables


class Memory:
    """The tables of a builder, some of their entries changed or gone."""

    def __init__(self, tables: TableBuilder) -> None:
        self.tables = tables
        self.changed: dict[int, int | None] = {}

    def read(self, gpa: int, size: int) -> int | None:
        """A ``read_entry``."""
        return self.changed[gpa] if gpa in self.changed else self.tables.read_entry(gpa, size)


def entry_at(tables: TableBuilder, level: int) -> tuple[int, int]:
    """(gpa, value) of the entry of ``level`` on the way to GVA."""
    result = walk(tables.state, GVA, READ, False, tables.read_entry)
    assert isinstance(result, Translation)
    return next((gpa, value) for gpa, value, at in result.entries if at == level)


# Section 4.6.1 of the SDM, row by row; "-" is "either".  What no row allows is a page fault.
RULES = """
    # who    access  US RW XD   WP SMEP SMAP AC
    super    read    0  -  -    -  -    -    -
    super    read    1  -  -    -  -    0    -
    super    read    1  -  -    -  -    1    1
    super    write   0  -  -    0  -    -    -
    super    write   0  1  -    1  -    -    -
    super    write   1  -  -    0  -    0    -
    super    write   1  -  -    0  -    1    1
    super    write   1  1  -    1  -    0    -
    super    write   1  1  -    1  -    1    1
    super    fetch   0  -  0    -  -    -    -
    super    fetch   1  -  0    -  0    -    -
    user     read    1  -  -    -  -    -    -
    user     write   1  1  -    -  -    -    -
    user     fetch   1  -  0    -  -    -    -
"""
ROWS = [
    row.split() for row in RULES.splitlines() if row.strip() and not row.strip().startswith("#")
]


def manual_allows(who: str, kind: AccessKind, *flags: bool) -> bool:
    name = "write" if kind.writes else kind.name.lower()
    case = [who, name, *(str(int(flag)) for flag in flags)]
    return any(
        all(want in ("-", have) for want, have in zip(row, case, strict=True)) for row in ROWS
    )


@pytest.mark.parametrize("denied_at", [1, 2, 3, 4])
@pytest.mark.parametrize(("wp", "smep", "smap"), [*itertools.product((False, True), repeat=3)])
def test_rights_are_the_manuals(denied_at: int, wp: bool, smep: bool, smap: bool):
    """Every right, missing at every level, under every setting, for every access."""
    tables = one_page(PagingMode.FOUR_LEVEL, user=True)
    base = tables.state
    state = replace(
        base,
        cr0=base.cr0 if wp else base.cr0 & ~CR0_WP,
        cr4=base.cr4 | smep * CR4_SMEP | smap * CR4_SMAP,
    )
    gpa, entry = entry_at(tables, denied_at)
    for us, rw, xd in itertools.product((False, True), repeat=3):
        value = entry & ~(PT_USER_MASK | PT_WRITABLE_MASK | PT64_NX_MASK)
        memory = Memory(tables)
        memory.changed[gpa] = value | us * PT_USER_MASK | rw * PT_WRITABLE_MASK | xd * PT64_NX_MASK
        for kind, user, ac, implicit in itertools.product(
            AccessKind, (False, True), (False, True), (False, True)
        ):
            who = "user" if user and not implicit else "super"
            lifted = ac and not implicit
            allowed = manual_allows(who, kind, us, rw, xd, wp, smep, smap, lifted)
            result = walk(state, GVA, kind, user, memory.read, ac=ac, implicit=implicit)
            if allowed:
                assert isinstance(result, Translation)
                assert result.gpa == GPA
                assert (result.user, result.writable, result.executable) == (us, rw, not xd)
                assert state.permits(result.rights, kind, who == "user", ac=lifted)
            else:
                code = P | W * kind.writes | U * (who == "user") | I * (kind is FETCH)
                assert isinstance(result, PageFault)
                assert (result.gva, result.error_code, result.level) == (GVA, code, 1)
                assert len(result.entries) == 4


@pytest.mark.parametrize("mode", MODES)
def test_absent_entry_at_every_level(mode: PagingMode):
    tables = one_page(mode)
    for level in range(1, mode.levels + 1):
        memory = Memory(tables)
        gpa, entry = entry_at(tables, level)
        memory.changed[gpa] = entry & ~1
        result = walk(tables.state, GVA, WRITE, True, memory.read)
        assert isinstance(result, PageFault)
        assert (result.error_code, result.level) == (W | U, level)
        assert result.entries[-1] == (gpa, entry & ~1, level)


@pytest.mark.parametrize("mode", MODES)
def test_unreadable_entry_at_every_level(mode: PagingMode):
    tables = one_page(mode)
    for level in range(1, mode.levels + 1):
        memory = Memory(tables)
        gpa, _ = entry_at(tables, level)
        memory.changed[gpa] = None
        result = walk(tables.state, GVA, READ, False, memory.read)
        assert isinstance(result, EntryUnreadable)
        assert (result.entry_gpa, result.level, result.size) == (gpa, level, mode.entry_size)
        assert len(result.entries) == mode.levels - level


@pytest.mark.parametrize("mode", [PagingMode.PAE, PagingMode.FOUR_LEVEL, PagingMode.FIVE_LEVEL])
def test_reserved_bit_at_every_level(mode: PagingMode):
    tables = one_page(mode, user=True)
    state = replace(tables.state, maxphyaddr=40)
    for level in range(1, mode.levels + 1):
        memory = Memory(tables)
        gpa, entry = entry_at(tables, level)
        memory.changed[gpa] = entry | 1 << 40
        result = walk(state, GVA, READ, True, memory.read)
        assert isinstance(result, PageFault)
        assert (result.error_code, result.level) == (P | U | RSVD, level)
        # An absent entry has no reserved bits, and a missing right is found only later.
        memory.changed[gpa] = (entry | 1 << 40) & ~1
        absent = walk(state, GVA, READ, True, memory.read)
        assert isinstance(absent, PageFault)
        assert absent.error_code == U
        memory.changed[gpa] = (entry | 1 << 40) & ~PT_USER_MASK
        reserved = walk(state, GVA, READ, True, memory.read)
        assert isinstance(reserved, PageFault)
        assert reserved.error_code == P | U | RSVD


def test_nx_is_reserved_without_nxe():
    tables = one_page(PagingMode.FOUR_LEVEL, executable=False)
    state = replace(tables.state, efer=tables.state.efer & ~EFER_NXE)
    result = walk(state, GVA, READ, False, tables.read_entry)
    assert isinstance(result, PageFault)
    assert result.error_code == P | RSVD


@pytest.mark.parametrize(
    ("mode", "nxe", "smep", "reported"),
    [
        (PagingMode.FOUR_LEVEL, True, False, True),
        (PagingMode.FOUR_LEVEL, False, False, False),
        (PagingMode.FOUR_LEVEL, False, True, True),
        (PagingMode.PAE, True, False, True),
        (PagingMode.BITS32, True, False, False),  # NXE means nothing without PAE
        (PagingMode.BITS32, False, True, True),
    ],
)
def test_fetch_is_reported_with_nx_or_smep(mode: PagingMode, nxe: bool, smep: bool, reported: bool):
    tables = one_page(mode)
    base = tables.state
    efer = base.efer | EFER_NXE if nxe else base.efer & ~EFER_NXE
    state = replace(base, efer=efer, cr4=base.cr4 | smep * CR4_SMEP)
    result = walk(state, GVA + SIZE_4K, FETCH, False, tables.read_entry)
    assert isinstance(result, PageFault)
    assert result.error_code == I * reported


@pytest.mark.parametrize(
    ("mode", "bits"), [(PagingMode.FOUR_LEVEL, 48), (PagingMode.FIVE_LEVEL, 57)]
)
def test_canonical_addresses(mode: PagingMode, bits: int):
    tables = one_page(mode)
    half = 1 << bits - 1
    for gva in (half, half | GVA, (1 << 64) - half - 1, 1 << 63):
        assert walk(tables.state, gva, READ, False, tables.read_entry) == NonCanonical(gva)
    for gva in (half - 1, (1 << 64) - half, (1 << 64) - 1):
        assert isinstance(walk(tables.state, gva, READ, False, tables.read_entry), PageFault)


@pytest.mark.parametrize("mode", [PagingMode.BITS32, PagingMode.PAE])
def test_linear_addresses_have_32_bits_outside_long_mode(mode: PagingMode):
    tables = one_page(mode)
    result = walk(tables.state, GVA | 0xFFFF_FFFF_0000_0000, READ, False, tables.read_entry)
    assert isinstance(result, Translation)
    assert result.gpa == GPA


def test_without_paging_the_address_is_physical():
    def read_entry(gpa: int, size: int) -> int | None:
        raise AssertionError("there is nothing to read")

    state = PagingState(cr0=1, cr3=0xDEAD_F000, cr4=0, efer=0)
    result = walk(state, 0xFFFF_FFF0, FETCH, True, read_entry)
    assert isinstance(result, Translation)
    assert (result.gpa, result.entries, result.table) == (0xFFFF_FFF0, (), None)
    assert result.writable
    assert result.user
    assert result.executable


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", AccessKind)
def test_accessed_and_dirty_updates(mode: PagingMode, kind: AccessKind):
    """Applying the updates is all it takes: the second walk has none."""
    tables = TableBuilder(mode, ROOT, accessed=False, dirty=False)
    tables.map(Mapping(GVA, GPA, SIZE_4K))
    memory = Memory(tables)
    first = walk(tables.state, GVA, kind, False, memory.read)
    assert isinstance(first, Translation)
    assert first.dirty == kind.writes
    flagged = {gpa: value for gpa, value, _ in first.updates}
    for gpa, value, level in first.entries:
        if mode is PagingMode.PAE and level == 3:
            assert gpa not in flagged
            continue
        dirty = PT_DIRTY_MASK if level == 1 and kind.writes else 0
        assert flagged[gpa] == value | PT_ACCESSED_MASK | dirty
    assert {size for _, _, size in first.updates} == {mode.entry_size}
    memory.changed.update(flagged)
    second = walk(tables.state, GVA, kind, False, memory.read)
    assert isinstance(second, Translation)
    assert second.updates == ()
    assert second.dirty == first.dirty


def test_pdpte_registers_take_the_place_of_memory():
    tables = one_page(PagingMode.PAE)
    _, pdpte = entry_at(tables, 3)
    memory = Memory(tables)
    memory.changed[ROOT] = None  # the table at CR3 is gone; the registers were loaded before
    state = replace(tables.state, pdptes=(pdpte, 0, 0, 0))
    result = walk(state, GVA, READ, False, memory.read)
    assert isinstance(result, Translation)
    assert (result.gpa, [level for _, _, level in result.entries]) == (GPA, [2, 1])
    fault = walk(state, GVA | 1 << 30, READ, True, memory.read)
    assert fault == PageFault(GVA | 1 << 30, U, 3, ())
    own = walk(state, GVA | 1 << 30, READ, True, memory.read, implicit=True)
    assert own == PageFault(GVA | 1 << 30, 0, 3, ())


def test_root_is_the_address_in_cr3():
    """CR3 also holds PCID, cache and masking bits; PAE's root is aligned to 32 bytes only."""
    cr3 = 0xFFFF_FFFF_FFFF_FFFF
    for mode, root in [
        (PagingMode.BITS32, 0xFFFF_F000),
        (PagingMode.PAE, 0xFFFF_FFE0),
        (PagingMode.FOUR_LEVEL, 0xFF_FFFF_F000),
        (PagingMode.FIVE_LEVEL, 0xFF_FFFF_F000),
    ]:
        state = replace(TableBuilder(mode, ROOT).state, cr3=cr3, maxphyaddr=40)
        assert (state.root.gpa, state.root.level) == (root, mode.levels)


LARGE = [
    (PagingMode.BITS32, SIZE_4M),
    (PagingMode.PAE, SIZE_2M),
    (PagingMode.FOUR_LEVEL, SIZE_2M),
    (PagingMode.FOUR_LEVEL, SIZE_1G),
    (PagingMode.FIVE_LEVEL, SIZE_2M),
    (PagingMode.FIVE_LEVEL, SIZE_1G),
]


@pytest.mark.parametrize(("mode", "size"), LARGE)
def test_large_pages(mode: PagingMode, size: int):
    tables = TableBuilder(mode, ROOT)
    tables.map(Mapping(size, 2 * size, size, page_size=size, writable=False))
    level = mode.page_sizes.index(size) + 1
    for offset in (0, 0x12_3456, size - 1):
        result = walk(tables.state, size + offset, READ, False, tables.read_entry)
        assert isinstance(result, Translation)
        assert (result.gpa, result.page_size) == (2 * size + offset, size)
        assert (len(result.entries), result.entries[-1][2]) == (mode.levels - level + 1, level)
    fault = walk(tables.state, size, WRITE, False, tables.read_entry)
    assert isinstance(fault, PageFault)
    assert (fault.error_code, fault.level) == (P | W, level)


@pytest.mark.parametrize(("mode", "size"), LARGE)
def test_misaligned_large_page_is_a_reserved_bit(mode: PagingMode, size: int):
    tables = TableBuilder(mode, ROOT)
    tables.map(Mapping(size, 0, size, page_size=size))
    result = walk(tables.state, size, READ, False, tables.read_entry)
    assert isinstance(result, Translation)
    gpa, entry, _ = result.entries[-1]
    memory = Memory(tables)
    # The highest bit below the page's address; for PSE-36 the only one that is never an address.
    memory.changed[gpa] = entry | size >> 1
    fault = walk(tables.state, size, READ, False, memory.read)
    assert isinstance(fault, PageFault)
    assert fault.error_code == P | RSVD
    memory.changed[gpa] = entry | 1 << 12  # PAT
    assert isinstance(walk(tables.state, size, READ, False, memory.read), Translation)


def test_pse36_reaches_above_4_gib():
    tables = TableBuilder(PagingMode.BITS32, ROOT)
    tables.map(Mapping(0, 0xAB_C000_0000, SIZE_4M, page_size=SIZE_4M))
    result = walk(tables.state, 0x1234, READ, False, tables.read_entry)
    assert isinstance(result, Translation)
    assert result.gpa == 0xAB_C000_1234
    narrow = walk(replace(tables.state, maxphyaddr=36), 0x1234, READ, False, tables.read_entry)
    assert isinstance(narrow, PageFault)
    assert narrow.error_code == P | RSVD


words = st.integers(0, (1 << 64) - 1)
states = st.builds(
    PagingState,
    cr0=words.map(lambda value: value | 1 << 31),
    cr3=words,
    cr4=words,
    efer=words,
    maxphyaddr=st.integers(32, 52),
    gbpages=st.booleans(),
    pdptes=st.none() | st.tuples(words, words, words, words),
)


@settings(max_examples=400, deadline=None)
@given(states, words, st.sampled_from(AccessKind), st.booleans(), st.booleans(), words)
def test_any_bytes_give_a_result(
    state: PagingState, gva: int, kind: AccessKind, user: bool, friendly: bool, seed: int
):
    """Random tables never raise, and what comes back is consistent in itself."""

    def read_entry(gpa: int, size: int) -> int | None:
        assert gpa % size == 0
        assert 0 <= gpa < 1 << 52
        draw = random.Random(seed ^ gpa)
        if draw.random() < 0.02:
            return None
        value = draw.getrandbits(8 * size) | 1
        # Most random entries have some reserved bit set; keep half of the walks going.
        return value & 0xFFFF_F067 | PT_USER_MASK if friendly else value

    result = walk(state, gva, kind, user, read_entry)
    match result:
        case Translation():
            offset = result.page_size - 1
            assert result.gpa & offset == gva & offset
            assert result.page_size in state.mode.page_sizes
            assert state.permits(result.rights, kind, user)
            old = {gpa: value for gpa, value, _ in result.entries}
            for gpa, value, size in result.updates:
                assert size == state.mode.entry_size
                assert 0 < value ^ old[gpa] <= PT_ACCESSED_MASK | PT_DIRTY_MASK
            assert result.table is not None
            again = walk_from(state, result.table, gva & _linear(state), kind, user, read_entry)
            assert isinstance(again, Translation)
            assert again.entries == result.entries[-1:]
            assert again.updates == tuple(u for u in result.updates if u[0] == again.entries[0][0])
            same = again._replace(entries=result.entries, updates=result.updates)
            assert same == result
        case PageFault():
            assert bool(result.error_code & W) == kind.writes
            assert bool(result.error_code & U) == user
            assert result.error_code & (P | RSVD) != RSVD
            if result.entries:
                assert result.entries[-1][2] == result.level
                assert bool(result.entries[-1][1] & 1) == bool(result.error_code & P)
        case NonCanonical():
            assert gva >> state.linear_bits - 1 not in (0, (1 << 65 - state.linear_bits) - 1)
        case EntryUnreadable():
            assert read_entry(result.entry_gpa, result.size) is None


def _linear(state: PagingState) -> int:
    return 0xFFFF_FFFF if state.linear_bits == 32 else (1 << 64) - 1


@pytest.mark.parametrize("mode", MODES)
def test_walk_from_a_kept_table_serves_its_neighbours(mode: PagingMode):
    """A cache keyed as the docstring says gives what whole walks give."""
    tables = TableBuilder(mode, ROOT)
    tables.map(Mapping(GVA, GPA, 4 * SIZE_4K, user=True, writable=False))
    first = walk(tables.state, GVA, READ, True, tables.read_entry)
    assert isinstance(first, Translation)
    assert first.table is not None
    assert first.table.level == 1
    for gva in range(GVA - SIZE_4K, GVA + 6 * SIZE_4K, SIZE_4K):
        assert gva >> mode.shift(2) == GVA >> mode.shift(2)
        for kind, user in itertools.product(AccessKind, (False, True)):
            whole = walk(tables.state, gva, kind, user, tables.read_entry)
            rest = walk_from(tables.state, first.table, gva, kind, user, tables.read_entry)
            assert isinstance(whole, Translation | PageFault)
            assert isinstance(rest, Translation | PageFault)
            assert rest._replace(entries=whole.entries) == whole
            assert rest.entries == whole.entries[-1:]


def test_mode_follows_the_registers():
    pg, pae, la57, lme, lma = 1 << 31, 1 << 5, 1 << 12, 1 << 8, 1 << 10
    for cr0, cr4, efer, mode in [
        (0, pae | la57, lme | lma, PagingMode.NONE),
        (pg, 0, 0, PagingMode.BITS32),
        (pg, pae, 0, PagingMode.PAE),
        (pg, pae, lme, PagingMode.PAE),  # not active yet
        (pg, pae | la57, 0, PagingMode.PAE),
        (pg, pae, lme | lma, PagingMode.FOUR_LEVEL),
        (pg, pae | la57, lme | lma, PagingMode.FIVE_LEVEL),
    ]:
        assert PagingState(cr0, 0, cr4, efer).mode is mode
