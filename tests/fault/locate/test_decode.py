"""The choice among candidates, with a host that says what it is told to say."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, replace

from hypothesis import given, settings
from hypothesis import strategies as st

from guestfault.fault.access import Access, AccessKind, FoundBy
from guestfault.fault.locate.decode import DecodeLocator
from guestfault.fault.locate.residency import PageAccess, Verdict
from guestfault.memory.ram import PAGE_SIZE
from guestfault.memory.slots import MemorySlot, SlotMap
from guestfault.uapi import kvm as uapi
from guestfault.x86.segments import Segments
from guestfault.x86.tables import Mapping, PagingMode, TableBuilder

SIZE = 4 << 20
TABLES, CODE, DATA, OTHER, STACK = 0x10_0000, 0x5_0000, 0x20_0000, 0x21_0000, 0x22_0800
IDT, GDT, TSS = 0x30_0000, 0x31_0000, 0x32_0000
HVA = 0x7F00_0000_0000
SLOT = MemorySlot(0, SIZE, HVA, 0)

MOV = bytes.fromhex("488b03")  # mov rax, [rbx]
PUSH = bytes.fromhex("ff33")  # push qword ptr [rbx]
GATHER = bytes.fromhex("c4e26d90048b")  # vpgatherdd ymm0, [rbx + ymm1 * 4], ymm2


class World:
    """Guest memory as bytes; ``out`` are the pages without content, and the host as it is told."""

    def __init__(self, code: bytes, at: int = CODE) -> None:
        self.bytes = bytearray(SIZE)
        tables = TableBuilder(PagingMode.FOUR_LEVEL, TABLES)
        tables.map(Mapping(0, 0, SIZE, user=True))
        image = tables.image()
        self.bytes[TABLES : TABLES + len(image)] = image
        self.bytes[at : at + len(code)] = code
        self.out: set[int] = set()
        self.host: dict[int, Verdict] = {}
        self.regs = uapi.kvm_regs(rip=at, rflags=2, rbx=DATA, rsp=STACK)
        self.sregs = uapi.kvm_sregs(cr0=0x8005_0033, cr3=TABLES, cr4=0x20, efer=0xD00)
        segments = Segments.long_mode(3)
        segments = replace(segments, tr=replace(segments.tr, base=TSS))
        for name, fields in asdict(segments).items():
            setattr(self.sregs, name, uapi.kvm_segment(**fields))
        self.slots = SlotMap()
        self.slots.add(SLOT)

    def read(self, gpa: int, size: int) -> bytes | None:
        if gpa + size > SIZE or not self.is_in(gpa):
            return None
        return bytes(self.bytes[gpa : gpa + size])

    def read_entry(self, gpa: int, size: int) -> int | None:
        data = self.read(gpa, size)
        return None if data is None else int.from_bytes(data, "little")

    def is_in(self, gpa: int) -> bool:
        return gpa >> 12 not in self.out

    def verdicts(self, slot: MemorySlot, wanted: Iterable[PageAccess], errno: int) -> list[Verdict]:
        return [self.host.get(hva - HVA >> 12, Verdict.SERVED) for hva, _ in wanted]

    def say(self, verdict: Verdict, *gpas: int) -> None:
        self.host.update((gpa >> 12, verdict) for gpa in gpas)

    def ask(self) -> tuple[Access, ...]:
        return DecodeLocator(self.slots, self, self).locate(self.regs, self.sregs)


def test_one_absent_page_is_certain() -> None:
    world = World(MOV)
    world.say(Verdict.ABSENT, DATA)
    assert world.ask() == (
        Access(
            gpa=DATA,
            size=8,
            found_by=FoundBy.DECODE,
            gva=DATA,
            hva=HVA + DATA,
            slot=SLOT,
            kind=AccessKind.READ,
            instruction="mov rax, [rbx]",
            certain=True,
            why="operand: the only page of it that the host cannot serve",
        ),
    )


def test_nothing_is_remembered_of_tables_that_have_changed() -> None:
    world = World(MOV)
    world.say(Verdict.ABSENT, DATA, OTHER)
    for _ in range(2):
        assert [a.gpa for a in world.ask()] == [DATA]
    entry = TABLES + 3 * PAGE_SIZE + CODE // PAGE_SIZE * 8
    moved = CODE + 8 * PAGE_SIZE
    world.bytes[moved : moved + 7] = bytes.fromhex("488b8300000100")  # mov rax, [rbx + 0x10000]
    world.bytes[entry : entry + 8] = (moved | 7).to_bytes(8, "little")
    for _ in range(2):
        assert [(a.gpa, a.certain) for a in world.ask()] == [(OTHER, True)]
    world.out.add(entry // PAGE_SIZE)
    (access,) = world.ask()
    assert (access.gpa, access.gva, access.certain) == (entry, None, True)
    # Another VM with the same registers has tables of its own.
    another = World(MOV)
    another.say(Verdict.ABSENT, DATA)
    assert [(a.gpa, a.certain) for a in another.ask()] == [(DATA, True)]
    world.out.clear()
    world.sregs.ss.dpl = 0  # nor is a walk that was made with other rights
    assert [(a.gpa, a.certain) for a in world.ask()] == [(OTHER, True)]


def test_several_absent_pages_are_ranked_in_the_processors_order() -> None:
    world = World(PUSH)
    world.say(Verdict.ABSENT, STACK - 8, DATA)
    said = world.ask()
    assert [(a.gpa, a.kind, a.certain) for a in said] == [
        (DATA, AccessKind.READ, False),
        (STACK - 8, AccessKind.WRITE, False),
    ]
    assert all("one of 2 pages" in a.why for a in said)


def test_with_nothing_absent_everything_is_listed_and_nothing_certain() -> None:
    said = World(MOV).ask()
    assert {a.gpa for a in said[:2]} == {CODE, DATA}
    assert len(said) == 2 + 4 + 1  # with the four tables of one, and another's last
    assert not any(a.certain for a in said)


def test_code_that_is_not_in_is_not_believed() -> None:
    world = World(MOV)
    world.out = {CODE >> 12}
    (said,) = world.ask()
    assert (said.gpa, said.kind, said.certain) == (CODE, AccessKind.FETCH, True)
    assert said.instruction is None


def test_the_second_page_of_an_instruction_that_is_not_in() -> None:
    world = World(MOV, at=CODE + 0xFFE)
    world.out = {(CODE >> 12) + 1}
    (said,) = world.ask()
    assert (said.gpa, said.kind, said.certain) == (CODE + 0x1000, AccessKind.FETCH, True)


def test_a_table_that_is_not_in_ends_the_search() -> None:
    world = World(MOV)
    page_table_of_data = TABLES + 0x4000  # the second of two, after PML4, PDPT, PD and the first
    world.out = {page_table_of_data >> 12, DATA >> 12}
    (said,) = world.ask()
    assert said.certain
    assert said.gpa == page_table_of_data + (DATA >> 12 & 511) * 8
    assert (said.gva, said.size, said.kind) == (None, 8, AccessKind.READ)
    assert "level-1 page-table entry for gva 0x200000" in said.why


def test_a_flag_that_the_walk_sets_makes_the_entry_a_write() -> None:
    world = World(MOV)
    entry = TABLES + 0x4000 + (DATA >> 12 & 511) * 8
    world.bytes[entry] &= ~0x60  # neither accessed nor dirty
    world.say(Verdict.ABSENT, entry)
    (said,) = world.ask()
    assert (said.gpa, said.kind, said.certain) == (entry, AccessKind.READ_WRITE, True)


def test_one_page_that_the_host_may_have_failed_to_bring_in() -> None:
    world = World(MOV)
    world.say(Verdict.UNSURE, DATA)
    (said,) = world.ask()
    assert (said.gpa, said.certain) == (DATA, True)
    assert "everything else" in said.why
    world.say(Verdict.UNSURE, CODE)
    assert [(a.gpa, a.certain) for a in world.ask()] == [(CODE, False), (DATA, False)]


def test_both_sides_of_a_page_boundary() -> None:
    world = World(MOV)
    world.regs.rbx = DATA + 0xFFD
    world.say(Verdict.ABSENT, DATA + 0x1000)
    (said,) = world.ask()
    assert (said.gpa, said.gva, said.size) == (DATA + 0x1000, DATA + 0x1000, 5)
    world.say(Verdict.ABSENT, DATA)
    assert [(a.gpa, a.size) for a in world.ask()] == [(DATA + 0xFFD, 3), (DATA + 0x1000, 5)]


def test_an_address_that_is_not_known_is_not_named() -> None:
    world = World(GATHER)
    first = world.ask()[0]
    assert (first.gpa, first.certain) == (None, False)
    assert "its address is not known" in first.why


def interrupts(world: World) -> None:
    """An interrupt table, and a stack for CPL 0."""
    world.sregs.idt.base, world.sregs.idt.limit = IDT, 0xFFF
    world.sregs.gdt.base, world.sregs.gdt.limit = GDT, 0x2F
    gate = 0x8E00_0008_0000 | CODE & 0xFFFF | (CODE >> 16) << 48
    world.bytes[IDT : IDT + 4096] = gate.to_bytes(16, "little") * 256
    world.bytes[GDT + 8 : GDT + 16] = (0x00AF_9B00_0000_FFFF).to_bytes(8, "little")
    world.bytes[TSS + 4 : TSS + 12] = OTHER.to_bytes(8, "little")


def test_an_absent_interrupt_table_leaves_doubt() -> None:
    world = World(MOV)
    interrupts(world)
    world.say(Verdict.ABSENT, IDT)
    said = world.ask()
    assert [(a.gpa, a.certain) for a in said] == [(IDT, False)]
    assert "delivery of an event" in said[0].why
    world.say(Verdict.ABSENT, DATA)
    assert [(a.gpa, a.certain) for a in world.ask()] == [(DATA, False), (IDT, False)]


def test_an_exception_that_the_tables_foretell_is_followed() -> None:
    """The operand is not mapped, so the processor goes on to deliver #PF."""
    world = World(MOV)
    interrupts(world)
    world.regs.rbx = 1 << 30
    world.say(Verdict.ABSENT, OTHER - 8)
    (said,) = world.ask()
    assert (said.gpa, said.kind, said.certain) == (OTHER - 8, AccessKind.WRITE, True)
    world.say(Verdict.SERVED, OTHER - 8)
    world.say(Verdict.ABSENT, IDT)
    (said,) = world.ask()
    assert (said.gpa, said.size, said.certain) == (IDT + 14 * 16, 16, True)


def test_the_next_page_of_code_is_the_last_resort() -> None:
    world = World(MOV)
    world.say(Verdict.ABSENT, CODE + 0x1000)
    said = world.ask()
    assert [(a.gpa, a.kind, a.certain) for a in said] == [(CODE + 0x1000, AccessKind.FETCH, False)]


words = st.integers(0, (1 << 64) - 1)
pages = st.sets(st.integers(0, (SIZE >> 12) - 1), max_size=64)


@settings(max_examples=150, deadline=None)
@given(
    st.binary(min_size=1, max_size=15),
    st.lists(words, min_size=18, max_size=18),
    st.lists(st.integers(0, SIZE - 1), min_size=4, max_size=4),
    st.sampled_from([0x11, 0x10, 0x8005_0033]),
    st.sampled_from([0, 0x20, 0x1020]),
    st.sampled_from([0, 0xD00]),
    pages,
    pages,
    pages,
)
def test_any_state_has_an_answer(
    code: bytes,
    registers: list[int],
    near: list[int],
    cr0: int,
    cr4: int,
    efer: int,
    out: set[int],
    absent: set[int],
    unsure: set[int],
) -> None:
    """Nothing raises; what is certain stands alone and is a page that the host does not serve."""
    world = World(code)
    for (name, _), value in zip(uapi.kvm_regs._fields_, registers, strict=True):
        setattr(world.regs, name, value)
    world.regs.rbx, world.regs.rsp, world.regs.rsi, world.regs.rdi = near
    world.regs.rip = CODE
    world.sregs.cr0, world.sregs.cr4, world.sregs.efer = cr0, cr4, efer
    interrupts(world)
    world.host = {**dict.fromkeys(unsure, Verdict.UNSURE), **dict.fromkeys(absent, Verdict.ABSENT)}
    world.out = out
    said = world.ask()
    assert said
    if any(access.certain for access in said):
        (only,) = said
        assert only.gpa is not None
        assert only.gpa >> 12 in out | absent | unsure
