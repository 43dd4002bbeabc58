"""Segments against descriptors and attribute words that others have published."""

from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.x86.segments import (
    FLAT_GDT,
    UNUSABLE,
    Segment,
    SegmentError,
    Segments,
    flat_code32,
    flat_code64,
    flat_data,
    real_mode_segment,
)

bit = st.integers(0, 1)


@st.composite
def segments(draw: st.DrawFn) -> Segment:
    """Any segment that a descriptor can hold."""
    g = draw(bit)
    limit = draw(st.integers(0, 0xF_FFFF))
    present = draw(bit)
    return Segment(
        selector=draw(st.integers(0, 0xFFFF)),
        base=draw(st.integers(0, 0xFFFF_FFFF)),
        limit=limit << 12 | 0xFFF if g else limit,
        type=draw(st.integers(0, 15)),
        s=draw(bit),
        dpl=draw(st.integers(0, 3)),
        present=present,
        avl=draw(bit),
        l=draw(bit),
        db=draw(bit),
        g=g,
        unusable=1 - present,
    )


@given(segments())
def test_descriptor_round_trip(segment: Segment):
    assert Segment.from_descriptor(segment.selector, segment.to_descriptor()) == segment


@given(segments())
def test_attributes_round_trip(segment: Segment):
    attributes = segment.to_attributes()
    assert 0 <= attributes < 1 << 12
    back = Segment.from_attributes(segment.selector, segment.base, segment.limit, attributes)
    assert back == segment


@given(st.binary(min_size=8, max_size=8))
def test_any_descriptor_survives(descriptor: bytes):
    assert Segment.from_descriptor(0, descriptor).to_descriptor() == descriptor


@pytest.mark.parametrize(
    ("segment", "descriptor", "attributes"),
    [
        # Linux's GDT_ENTRY_INIT(flags, 0, 0xfffff), accessed (arch/x86/kernel/cpu/common.c).
        (flat_code64(0), 0x00AF_9B00_0000_FFFF, 0xA9B),
        (flat_code32(0), 0x00CF_9B00_0000_FFFF, 0xC9B),
        (flat_data(0), 0x00CF_9300_0000_FFFF, 0xC93),
        (flat_code32(3), 0x00CF_FB00_0000_FFFF, 0xCFB),
        (flat_data(3), 0x00CF_F300_0000_FFFF, 0xCF3),
        (flat_code64(3), 0x00AF_FB00_0000_FFFF, 0xAFB),
    ],
)
def test_flat_segments_are_those_of_linux(segment: Segment, descriptor: int, attributes: int):
    assert segment.to_descriptor() == descriptor.to_bytes(8, "little")
    assert segment.to_attributes() == attributes
    # The table holds it where its selector points, and the RPL is its DPL.
    at = segment.selector & ~7
    assert Segment.from_descriptor(segment.selector, FLAT_GDT[at : at + 8]) == segment
    assert segment.selector & 7 == segment.dpl


def test_the_flat_table_suits_syscall_and_sysret():
    """STAR[47:32] gives CS and, 8 further, SS; STAR[63:48] gives 32-bit CS, SS + 8, CS + 16."""
    assert flat_data(0).selector == flat_code64(0).selector + 8
    user = flat_code32(3).selector
    assert (flat_data(3).selector, flat_code64(3).selector) == (user + 8, user + 16)


def test_reset_attributes_of_real_mode():
    """The VMCB of a processor just reset: CS 0x9b, data 0x93 (AMD APM vol. 2, table 14-1)."""
    cs = real_mode_segment(0xF000, code=True)
    assert (cs.base, cs.limit, cs.to_attributes()) == (0xF_0000, 0xFFFF, 0x9B)
    ds = real_mode_segment(0x1234)
    assert (ds.base, ds.limit, ds.to_attributes()) == (0x1_2340, 0xFFFF, 0x93)


@pytest.mark.parametrize(
    "segment",
    [Segment(base=1 << 32), Segment(limit=0x10_0000), Segment(limit=0xFFFF_F000, g=1)],
)
def test_what_a_descriptor_cannot_hold(segment: Segment):
    with pytest.raises(SegmentError) as caught:
        segment.to_descriptor()
    assert caught.value.segment == segment


def test_unusable_has_no_present_bit():
    assert Segment(present=1, unusable=1).to_attributes() == 0
    assert UNUSABLE.to_attributes() == 0


@pytest.mark.parametrize("cpl", [0, 3])
def test_the_registers_of_a_mode_agree(cpl: int):
    for registers, code in [
        (Segments.long_mode(cpl), (1, 0)),
        (Segments.protected_mode(cpl), (0, 1)),
    ]:
        assert (registers.cs.l, registers.cs.db) == code
        # CPL is the DPL of SS, and what entry into a guest checks CS against.
        assert registers.cs.dpl == registers.ss.dpl == registers.ss.selector & 3 == cpl
        assert (registers.tr.type, registers.tr.present, registers.tr.s) == (11, 1, 0)
        assert registers.ldt.unusable


def test_big_real_mode_has_big_data_and_small_code():
    registers = Segments.big_real_mode(cs=0x100)
    assert (registers.cs.base, registers.cs.limit) == (0x1000, 0xFFFF)
    assert (registers.ds.base, registers.ds.limit, registers.ds.g) == (0, 0xFFFF_FFFF, 1)
    small = Segments.real_mode(cs=0x100, data=0x200)
    assert (small.ss.base, small.ss.limit, small.ss.g) == (0x2000, 0xFFFF, 0)


def test_fields_are_those_of_kvm_segment():
    kvm = pytest.importorskip("guestfault.uapi.kvm")
    names = {field[0] for field in kvm.kvm_segment._fields_} - {"padding"}
    assert {field.name for field in fields(Segment)} == names
