"""Accesses that Unicorn cannot show: interrupts, task state, ports, what is not known."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from guestfault.uapi import kvm as uapi
from guestfault.x86.accesses import AccessKind, MemoryAccess, PagePart, Role, accesses
from guestfault.x86.segments import Segment
from guestfault.x86.state import GPR_NAMES, CpuState, DescriptorTable

READ, WRITE = AccessKind.READ, AccessKind.WRITE
IDT, GDT, TSS, STACK = 0x1000, 0x2000, 0x3000, 0x9008


def gprs(**values: int) -> tuple[int, ...]:
    return tuple(values.get(name, 0) for name in GPR_NAMES)


def segment(
    selector: int = 0, base: int = 0, limit: int = 0xFFFF, type: int = 3, **fields: int
) -> Segment:
    """Present data of 64 KiB, unless it says otherwise."""
    return Segment(selector, base, limit, type, **{"s": 1, "present": 1, **fields})


def kernel(**more: object) -> CpuState:
    """64-bit code with small system tables."""
    values: dict[str, object] = {
        "gprs": gprs(rsp=STACK),
        "idt": DescriptorTable(IDT, 0xFFF),
        "gdt": DescriptorTable(GDT, 0xFF),
        "tr": segment(0x40, TSS, 0x67 + 8192, type=11, s=0),
    }
    return CpuState(**{**values, **more})  # type: ignore[arg-type]


class Bytes:
    """A sparse memory."""

    def __init__(self, **parts: bytes) -> None:
        self.parts = {int(name[1:], 16): data for name, data in parts.items()}

    def __call__(self, address: int, size: int) -> bytes | None:
        for start, data in self.parts.items():
            if start <= address and address + size <= start + len(data):
                return data[address - start : address - start + size]
        return None


def brief(listed: tuple[MemoryAccess, ...]) -> list[tuple[int | None, int, AccessKind, Role]]:
    return [(a.address, a.size, a.kind, a.role) for a in listed[1:]]


def test_the_dump_of_the_thread() -> None:
    listed = accesses(
        bytes.fromhex("41817e285f465648"), CpuState(gprs=gprs(r14=0xFFDCE000), rip=0xFFFD1CB5)
    )
    assert brief(listed) == [(0xFFDCE028, 4, READ, Role.OPERAND)]
    assert (listed[0].address, listed[0].size) == (0xFFFD1CB5, 8)


def test_a_fetch_that_crosses_a_page_is_two_parts() -> None:
    (fetch, *_) = accesses(bytes.fromhex("41817e285f465648"), CpuState(rip=0x1FFD))
    assert fetch.pages() == (PagePart(0x1FFD, 3), PagePart(0x2000, 5))


def test_outside_64_bit_mode_an_access_wraps_at_4_gib() -> None:
    state = CpuState(
        gprs=gprs(rbx=0xFFFF_FFFE),
        cs=segment(db=1, limit=0xFFFF_FFFF),
        ds=segment(db=1, limit=0xFFFF_FFFF),
        efer=0,
    )
    (_, access) = accesses(bytes.fromhex("8b03"), state)
    assert access.pages() == (PagePart(0xFFFF_FFFE, 2), PagePart(0, 2))


def gate(selector: int, ist: int = 0, dpl: int = 3) -> bytes:
    return struct.pack("<HHBBHII", 0x1000, selector, ist, 0x8E | dpl << 5, 0, 0, 0)


KERNEL_CODE = struct.pack("<Q", 0x00AF_9B00_0000_FFFF)


def frame(top: int) -> list[tuple[int, int, AccessKind, Role]]:
    return [(top - 8 * n, 8, WRITE, Role.STACK) for n in range(1, 6)]


def test_interrupt_in_long_mode_at_the_same_privilege() -> None:
    memory = Bytes(x1800=gate(8), x2008=KERNEL_CODE)
    assert brief(accesses(b"\xcd\x80", kernel(), memory=memory)) == [
        (IDT + 0x800, 16, READ, Role.GATE),
        (GDT + 8, 8, READ, Role.DESCRIPTOR),
        *frame(STACK & ~15),
    ]


@pytest.mark.parametrize(("ist", "slot"), [(0, 4), (1, 0x24), (7, 0x54)])
def test_interrupt_from_user_mode_takes_its_stack_from_the_tss(ist: int, slot: int) -> None:
    tss = {f"x{TSS + slot:x}": struct.pack("<Q", 0xA018)}
    memory = Bytes(x1800=gate(8, ist), x2008=KERNEL_CODE, **tss)
    state = kernel(ss=segment(dpl=3))
    assert brief(accesses(b"\xcd\x80", state, memory=memory)) == [
        (IDT + 0x800, 16, READ, Role.GATE),
        (GDT + 8, 8, READ, Role.DESCRIPTOR),
        (TSS + slot, 8, READ, Role.TSS),
        *frame(0xA010),
    ]


def test_interrupt_without_memory_is_certain_of_the_gate_only() -> None:
    listed = accesses(b"\xcc", kernel())
    assert [access.certain for access in listed] == [True, True, *[False] * 7]
    assert listed[1].address == IDT + 0x30
    assert listed[2].address is None
    assert listed[2].note == "the gate lies in guest memory"


def test_interrupt_beyond_the_idt_is_no_access() -> None:
    (_, only) = accesses(b"\xcd\xff", kernel(idt=DescriptorTable(IDT, 0x1F)))
    assert (only.address, only.certain) == (None, False)


def test_interrupt_of_a_32_bit_guest_switching_stacks() -> None:
    idt_gate = struct.pack("<HHHH", 0, 8, 0xEE00, 0)
    tss = struct.pack("<IH", 0xA000, 0x10)
    state = kernel(cs=segment(0x1B, db=1, dpl=3), ss=segment(0x23, db=1, dpl=3), efer=0, cr0=0x11)
    memory = Bytes(
        x1400=idt_gate,
        x2008=struct.pack("<QQ", 0x00CF_9B00_0000_FFFF, 0x00CF_9300_0000_FFFF),
        x3004=tss,
    )
    assert brief(accesses(b"\xcd\x80", state, memory=memory)) == [
        (IDT + 0x400, 8, READ, Role.GATE),
        (GDT + 8, 8, READ, Role.DESCRIPTOR),
        (TSS + 4, 6, READ, Role.TSS),
        (GDT + 0x10, 8, READ, Role.DESCRIPTOR),
        *((0xA000 - 4 * n, 4, WRITE, Role.STACK) for n in range(1, 6)),
    ]


def test_interrupt_in_real_mode_pushes_before_it_reads_the_vector() -> None:
    state = CpuState(
        gprs=gprs(rsp=0x100), cs=segment(), ss=segment(0x200, 0x2000), cr0=0x10, efer=0
    )
    assert brief(accesses(b"\xcd\x21", state)) == [
        (0x20FE, 2, WRITE, Role.STACK),
        (0x20FC, 2, WRITE, Role.STACK),
        (0x20FA, 2, WRITE, Role.STACK),
        (0x84, 4, READ, Role.INTERRUPT_VECTOR),
    ]


def test_iret_to_user_mode_reads_two_more_words_and_two_descriptors() -> None:
    state = kernel(cs=segment(8, db=1), ss=segment(0x10, db=1), efer=0, cr0=0x11)
    memory = Bytes(x9008=struct.pack("<IIIII", 0x1000, 0x1B, 2, 0x8000, 0x23))
    listed = accesses(b"\xcf", state, memory=memory)
    reads = [access for access in listed if access.kind is READ]
    assert [(a.address, a.size) for a in reads] == [
        *((STACK + 4 * n, 4) for n in range(5)),
        (GDT + 0x18, 8),
        (GDT + 0x20, 8),
    ]
    assert all(access.certain for access in reads)


def test_iret_with_nt_set_reads_the_back_link() -> None:
    state = kernel(cs=segment(8, db=1), ss=segment(db=1), efer=0, rflags=2 | 1 << 14)
    assert (TSS, 2, READ, Role.TSS) in brief(accesses(b"\xcf", state))


def test_port_io_of_a_user_process_reads_the_bitmap() -> None:
    state = kernel(gprs=gprs(rdx=0x3F8), ss=segment(dpl=3))
    memory = Bytes(x3066=struct.pack("<H", 0x68))
    assert brief(accesses(b"\xee", state, memory=memory)) == [
        (TSS + 0x66, 2, READ, Role.TSS),
        (TSS + 0x68 + 0x3F8 // 8, 2, READ, Role.IO_BITMAP),
    ]
    assert len(accesses(b"\xee", kernel())) == 1, "a kernel's port I/O reads no bitmap"


@pytest.mark.parametrize(
    ("code", "size", "kind"),
    [("0f01c8", 1, READ), ("0f01fc", 64, WRITE), ("f30faef0", 1, READ)],
)
def test_operands_named_by_rax(code: str, size: int, kind: AccessKind) -> None:
    (_, access) = accesses(bytes.fromhex(code), kernel(gprs=gprs(rax=0x5040)))
    assert (access.address, access.size, access.kind) == (0x5040, size, kind)


def test_mov_to_cr3_under_pae_reads_the_directory_pointers_physically() -> None:
    state = CpuState(
        gprs=gprs(rax=0x7020), cs=segment(db=1, limit=0xFFFF_FFFF), cr0=0x8000_0011, efer=0
    )
    (_, access) = accesses(bytes.fromhex("0f22d8"), state)
    assert (access.address, access.size, access.physical) == (0x7020, 32, True)


def test_movdir64b_reads_one_operand_and_writes_the_other() -> None:
    state = kernel(gprs=gprs(rax=0x7000, rbx=0x8010))
    assert brief(accesses(bytes.fromhex("660f38f803"), state)) == [
        (0x8010, 64, READ, Role.OPERAND),
        (0x7000, 64, WRITE, Role.OPERAND),
    ]


def test_xsave_is_a_header_a_legacy_region_and_what_xcr0_says() -> None:
    code = bytes.fromhex("0fae23")
    state = kernel(gprs=gprs(rbx=0x8000, rax=7), xcr0=7)
    listed = accesses(code, state)
    assert [(a.address, a.size, a.certain) for a in listed[1:]] == [
        (0x8200, 8, True),
        (0x8000, 512, True),
        (0x8240, 256, False),
    ]
    assert len(accesses(code, kernel(gprs=gprs(rbx=0x8000, rax=3), xcr0=7))) == 3


def test_a_repeat_names_its_next_element_and_the_rest() -> None:
    state = kernel(gprs=gprs(rcx=0x200, rsi=0x5000, rdi=0x8FF8), rflags=2 | 1 << 10)
    (_, source, destination) = accesses(bytes.fromhex("f348a5"), state)
    assert (source.address, source.span) == (0x5000, (0x5000 - 0x1FF * 8, 0x1000))
    assert (destination.kind, destination.note) == (WRITE, "0x200 elements left")


def test_addresses_the_guest_itself_faults_on_say_so() -> None:
    (_, access) = accesses(bytes.fromhex("8b03"), kernel(gprs=gprs(rbx=1 << 62)))
    assert "not canonical" in access.note
    state = CpuState(gprs=gprs(rbx=0x2000), cs=segment(db=1), ds=segment(limit=0xFFF), efer=0)
    (_, access) = accesses(bytes.fromhex("8b03"), state)
    assert "beyond the segment's limit" in access.note


def test_bytes_that_are_no_instruction_are_still_fetched() -> None:
    (fetch,) = accesses(bytes.fromhex("41817e"), CpuState(rip=0x1000))
    assert (fetch.address, fetch.note) == (0x1000, "its bytes are not all known")
    assert len(accesses(b"\x0f\x0b", CpuState())) == 1
    assert len(accesses(b"", CpuState())) == 1


def test_registers_come_from_kvm() -> None:
    regs = uapi.kvm_regs(rip=0x7C00, rax=1, rbx=2, r15=3, rflags=0x202)
    sregs = uapi.kvm_sregs(cr0=0x11, cr3=0x5000)
    sregs.cs.base, sregs.cs.db, sregs.cs.limit = 0x100, 1, 0xFFFF_FFFF
    sregs.ss.dpl = 3
    sregs.idt.base = 0x9000
    state = CpuState.from_kvm(regs, sregs)
    assert (state.gprs[0], state.gprs[3], state.gprs[15]) == (1, 2, 3)
    assert (state.code_size, state.cpl, state.idt.base, state.cs.base) == (32, 3, 0x9000, 0x100)


segments = st.builds(
    Segment,
    selector=st.integers(0, 0xFFFF),
    base=st.integers(0, (1 << 64) - 1),
    limit=st.integers(0, 0xFFFF_FFFF),
    type=st.integers(0, 15),
    dpl=st.integers(0, 3),
    l=st.integers(0, 1),
    db=st.integers(0, 1),
)
states = st.builds(
    CpuState,
    gprs=st.tuples(*[st.integers(0, (1 << 64) - 1)] * 16),
    rip=st.integers(0, (1 << 64) - 1),
    rflags=st.integers(0, (1 << 22) - 1),
    cs=segments,
    ss=segments,
    tr=segments,
    cr0=st.sampled_from([0x10, 0x11, 0x8000_0011]),
    cr4=st.sampled_from([0, 0x20, 1 << 23]),
    efer=st.sampled_from([0, 0x500]),
    vectors=st.dictionaries(st.integers(0, 31), st.binary(max_size=64), max_size=3),
    masks=st.dictionaries(st.integers(0, 7), st.integers(0, (1 << 64) - 1), max_size=2),
)
prefixes = st.sampled_from([b"", b"\x0f", b"\xf3", b"\x66", b"\x0f\xae", b"\x62", b"\xc4\xe2"])


@settings(max_examples=400, deadline=None)
@given(prefixes, st.binary(max_size=15), states, st.binary(min_size=16, max_size=16))
def test_no_bytes_and_no_registers_make_it_raise(
    prefix: bytes, code: bytes, state: CpuState, memory: bytes
) -> None:
    listed = accesses(prefix + code, state, memory=lambda _address, size: memory[:size])
    assert listed[0].kind is AccessKind.FETCH
    for access in listed:
        assert access.size > 0
        assert access.certain or access.note
        if access.address is None:
            assert not access.certain
        else:
            assert 0 <= access.address < 1 << 64
            assert sum(part.size for part in access.pages()) == access.size
