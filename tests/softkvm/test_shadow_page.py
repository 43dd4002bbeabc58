"""The table of shadow pages by itself: what is linked, what is mapped, and the way back."""

from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from guestfault.softkvm.shadow_page import (
    ACC_ALL,
    ACC_EXEC_MASK,
    ACC_USER_MASK,
    ACC_WRITE_MASK,
    KvmMmu,
    Role,
    ShadowTable,
    access_of_rights,
    access_of_spte,
    hardware_permissions,
    make_spte,
    mmio_access_bits,
    spte_index,
)
from guestfault.x86.access_kind import AccessKind
from guestfault.x86.entries import PT64_NX_MASK, PT_WRITABLE_MASK
from guestfault.x86.paging_state import ALL_RIGHTS, PagingState
from guestfault.x86.registers import CR0_PE, CR0_PG, CR4_SMAP, CR4_SMEP

HVA = 0x7000_0000_0000
READ, WRITE, FETCH = AccessKind.READ, AccessKind.WRITE, AccessKind.FETCH
ROLES = [Role(level, direct, access) for level in (1, 2) for direct in (0, 1) for access in (5, 7)]


@given(st.integers(0, 7), st.integers(0, 2**35 - 1))
def test_an_entry_keeps_its_page_and_its_rights(access: int, frame: int) -> None:
    spte = make_spte(frame << 12, access)
    assert access_of_spte(spte) == access
    assert spte & (2**47 - 1) & -4096 == frame << 12
    mmu = KvmMmu()
    mmu.permissions = hardware_permissions(PagingState(CR0_PE | CR0_PG, 0, 0, 0))
    device = 0x1234_0010 | mmio_access_bits(access)
    for kind, needs in ((READ, 0), (WRITE, ACC_WRITE_MASK), (FETCH, ACC_EXEC_MASK)):
        for user in (False, True):
            allowed = access & needs == needs and (not user or access & ACC_USER_MASK != 0)
            assert mmu.permits(spte, kind, user, False) is allowed
            assert mmu.permits_mmio(device, kind, user, False) is allowed
    assert not mmu.permits(device, READ, False, False)
    assert not mmu.permits(0, READ, False, False)


def test_rights_of_a_walk() -> None:
    assert access_of_rights(ALL_RIGHTS) == ACC_ALL
    assert access_of_rights(ALL_RIGHTS & ~PT64_NX_MASK) == ACC_ALL & ~ACC_EXEC_MASK


def test_the_processor_guards_pages_only_while_the_guest_has_paging() -> None:
    user_page = make_spte(HVA, ACC_ALL)
    mmu = KvmMmu()
    for cr0, guarded in ((CR0_PE | CR0_PG, True), (CR0_PE, False)):
        mmu.permissions = hardware_permissions(PagingState(cr0, 0, CR4_SMEP | CR4_SMAP, 0))
        assert mmu.permits(user_page, FETCH, False, False) is not guarded
        assert mmu.permits(user_page, READ, False, False) is not guarded
        assert mmu.permits(user_page, READ, False, True)


def test_a_walk_of_shadow_pages() -> None:
    table, mmu = ShadowTable(), KvmMmu()
    assert mmu.look_up(0) == (0, 0)
    assert mmu.is_obsolete()
    root, leaf = table.add(0x10, Role(2)), table.add(0x11, Role(1))
    mmu.roots = None, root, None, None  # the second GiB
    address = 1 << 30 | 5 << 21 | 7 << 12
    assert (spte_index(address, 2), spte_index(address, 1)) == (5, 7)
    table.link(root, 5, leaf)
    table.set_spte(leaf, 7, make_spte(HVA, ACC_ALL), 0x42)
    assert mmu.look_up(address | 0xABC) == (make_spte(HVA, ACC_ALL), 0x42)
    assert mmu.look_up(address + 0x1000) == mmu.look_up(5 << 21) == (0, 0)
    table.remove(root)
    assert mmu.is_obsolete()
    assert leaf.parents == set()


def test_a_page_is_found_by_its_frame_and_role() -> None:
    table = ShadowTable()
    pages = [table.add(gfn, role) for gfn in (1, 2) for role in ROLES]
    assert [table.find(sp.gfn, sp.role) for sp in pages] == pages
    assert table.find(3, ROLES[0]) is None
    assert table.with_gptes(1) == [sp for sp in pages[: len(ROLES)] if not sp.role.direct]


class Tables(RuleBasedStateMachine):
    """Whatever is done: the reverse map is the map reversed, and links have two equal ends."""

    def __init__(self) -> None:
        super().__init__()
        self.table = ShadowTable()

    def page(self, n: int):
        pages = list(self.table.active)
        return pages[n % len(pages)] if pages else self.table.add(n % 5, ROLES[0])

    @rule(gfn=st.integers(0, 4), role=st.sampled_from(ROLES))
    def add(self, gfn, role) -> None:
        if self.table.find(gfn, role) is None:
            self.table.add(gfn, role)

    @rule(n=st.integers(0, 20), m=st.integers(0, 20), index=st.integers(0, 3))
    def link(self, n, m, index) -> None:
        parent, child = self.page(n), self.page(m)
        if parent is not child:
            self.table.link(parent, index, child)
            assert index not in parent.spt

    @rule(n=st.integers(0, 20), index=st.integers(0, 3), gfn=st.integers(0, 9))
    def map(self, n, index, gfn) -> None:
        sp = self.page(n)
        self.table.unlink(sp, index)
        self.table.set_spte(sp, index, make_spte(HVA + (gfn << 12), ACC_ALL), gfn)

    @rule(first=st.integers(0, 9), count=st.sampled_from([0, 1, 3, 1 << 30]))
    def unmap(self, first, count) -> None:
        mapped = {gfn for sp in self.table.active for _, gfn in sp.spt.values()}
        gfns = range(first, first + count)
        assert self.table.unmap_gfns(gfns) is any(gfn in gfns for gfn in mapped)
        assert not any(gfn in gfns for sp in self.table.active for _, gfn in sp.spt.values())

    @rule(first=st.integers(0, 9), count=st.sampled_from([0, 1, 3, 1 << 30]))
    def protect(self, first, count) -> None:
        gfns = range(first, first + count)
        writable = [gfn for sp in self.table.active for spte, gfn in sp.spt.values() if spte & 2]
        found = self.table.write_protect_gfns(gfns)
        assert found is any(gfn in gfns for gfn in writable)
        for _, _, spte in self.table.entries():
            gfn = (spte & (2**47 - 1)) - HVA >> 12
            assert not (spte & PT_WRITABLE_MASK and gfn in gfns)

    @rule(n=st.integers(0, 20))
    def remove(self, n) -> None:
        sp = self.page(n)
        self.table.remove(sp)
        assert sp.invalid
        assert (sp.spt, sp.children, sp.parents) == ({}, {}, set())
        assert sp not in self.table.active
        assert self.table.find(sp.gfn, sp.role) is not sp

    @invariant()
    def maps_agree(self) -> None:
        forth = {(gfn, sp, index) for sp in self.table.active for index, (_, gfn) in sp.spt.items()}
        back = {(gfn, *entry) for gfn, rmap in self.table._rmaps.items() for entry in rmap}
        assert forth == back
        down = {(p, i, c) for p in self.table.active for i, c in p.children.items()}
        up = {(p, i, c) for c in self.table.active for p, i in c.parents}
        assert down == up


TestTables = Tables.TestCase
