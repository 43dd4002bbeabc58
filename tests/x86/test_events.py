"""What any event could touch, against what the delivery of one does touch."""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from guestfault.x86.addressing import CodeContext
from guestfault.x86.events import possible_deliveries
from guestfault.x86.segments import Segment
from guestfault.x86.state import GPR_NAMES, CpuState, DescriptorTable
from guestfault.x86.transfer import interrupt

IDT, GDT, TSS, RSP, RSP0, IST = 0x1000, 0x2000, 0x3000, 0x9008, 0xA010, 0xB010


def state(cpl: int) -> CpuState:
    return CpuState(
        gprs=tuple(RSP if name == "rsp" else 0 for name in GPR_NAMES),
        ss=Segment(dpl=cpl, s=1, present=1),
        idt=DescriptorTable(IDT, 0xFFF),
        gdt=DescriptorTable(GDT, 0xFF),
        tr=Segment(base=TSS, limit=0x67, type=11, present=1),
    )


def memory(address: int, size: int) -> bytes | None:
    data = bytearray(0x4000)
    struct.pack_into("<Q", data, GDT + 8, 0x00AF_9B00_0000_FFFF)
    struct.pack_into("<Q", data, TSS + 4, RSP0)
    struct.pack_into("<Q", data, TSS + 0x24, IST)
    for vector in range(256):
        struct.pack_into("<HHBB", data, IDT + 16 * vector, 0, 8, vector & 1, 0xEE)
    return bytes(data[address : address + size])


@pytest.mark.parametrize("cpl", [0, 3])
@pytest.mark.parametrize("vector", [2, 3, 14, 0xFF])
@pytest.mark.parametrize("error_code", [False, True])
def test_nothing_that_a_delivery_touches_is_missing(
    cpl: int, vector: int, error_code: bool
) -> None:
    context = CodeContext(state(cpl), 64, memory)
    possible = {p.page for access in possible_deliveries(context) for p in access.pages()}
    made = interrupt(context, vector, error_code=error_code)
    assert sum(access.kind.writes for access in made) == 5 + error_code
    assert {p.page for access in made for p in access.pages()} <= possible


def test_nothing_is_certain() -> None:
    context = CodeContext(state(3), 64, memory)
    assert not any(access.certain for access in possible_deliveries(context))


def test_without_a_table_there_is_no_delivery() -> None:
    none = replace(state(0), idt=DescriptorTable(IDT, 0))
    assert possible_deliveries(CodeContext(none, 64, memory)) == []


def test_real_mode_reads_a_vector_and_pushes_three_words() -> None:
    real = replace(state(0), cr0=0x10, efer=0, ss=Segment(limit=0xFFFF, s=1, present=1))
    vectors, frame = possible_deliveries(CodeContext(real, 16, None))
    assert (vectors.address, vectors.size) == (IDT, 1024)
    assert (frame.address, frame.size) == (RSP - 6, 6)
