"""The local APIC by itself: priorities, what is in service, the registers of x2APIC mode."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.softkvm.lapic import X2APIC_MSRS, KvmLapic

X2APIC, XAPIC = 0xFEE00D00, 0xFEE00900
TPR, PPR, EOI, SVR, ISR, IRR, SELF_IPI = 0x808, 0x80A, 0x80B, 0x80F, 0x810, 0x820, 0x83F


def make(base=X2APIC, svr=0x1FF):
    apic = KvmLapic(3)
    apic.apic_base, apic.svr = base, svr
    return apic


def test_reset():
    apic = KvmLapic(3)
    assert not apic.enabled
    assert not apic.accept_irq(0x31)
    assert apic.has_interrupt() is None


VECTORS = st.integers(16, 255)


@given(st.lists(st.one_of(VECTORS, st.sampled_from(["get", "eoi"])), max_size=60))
def test_the_most_urgent_goes_first_and_nothing_is_lost(events):
    """What is taken is above all in service, by class; each that came is taken once, or waits."""
    apic = make()
    waiting, in_service = set(), []
    for event in events:
        if event == "eoi":
            apic.set_eoi()
            if in_service:
                in_service.remove(max(in_service))
        elif event == "get":
            highest = max(waiting, default=None)
            busy = max(in_service, default=0)
            expected = highest if highest is not None and highest >> 4 > busy >> 4 else None
            assert apic.has_interrupt() == expected
            assert apic.get_interrupt() == expected
            if expected is not None:
                waiting.remove(expected)
                in_service.append(expected)
        else:
            apic.accept_irq(event)
            waiting.add(event)
        assert {v for v in range(256) if apic.irr >> v & 1} == waiting
        assert {v for v in range(256) if apic.isr >> v & 1} == set(in_service)


def test_the_task_priority_is_the_upper_half_of_cr8_s():
    apic = make()
    assert apic.write(TPR, 0x45)
    assert apic.cr8 == 4
    apic.cr8 = 4
    assert apic.tpr == 0x45, "CR8 has not changed: its lower half stays"
    apic.accept_irq(0x4F)
    assert apic.has_interrupt() is None
    apic.cr8 = 3
    assert apic.get_interrupt() == 0x4F
    assert apic.read(PPR) == 0x40


def test_irr_and_isr_are_read_in_eight_parts():
    apic = make()
    for vector in (0x31, 0xFE):
        apic.accept_irq(vector)
    assert apic.get_interrupt() == 0xFE
    assert [apic.read(IRR + i) for i in range(8)] == [0, 1 << 17, 0, 0, 0, 0, 0, 0]
    assert apic.read(ISR + 7) == 1 << 30


@pytest.mark.parametrize("base", [XAPIC, 0xFEE00100], ids=["xAPIC", "off"])
def test_there_are_no_msrs_in_another_mode(base):
    apic = make(base)
    assert all(apic.read(index) is None for index in X2APIC_MSRS)
    assert not any(apic.write(index, 0) for index in X2APIC_MSRS)
    assert apic.self_ipi(SELF_IPI, 0x31) is None


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (TPR, 0x100),
        (EOI, 1),
        (SVR, 0x400),
        (0x802, 0),  # the id
        (0x830, 0xF1),  # ICR: there is nobody else to send to
        (0x838, 1),  # the timer
        (0x832, 0x31),  # its vector, not masked
        (SELF_IPI, 0x31),  # not written: sent
    ],
)
def test_what_is_not_there_is_refused(index, value):
    assert not make().write(index, value)


@pytest.mark.parametrize(
    ("value", "vector"), [(0x10, 0x10), (0xFF, 0xFF), (0xF, None), (256, None)]
)
def test_an_interrupt_to_itself(value, vector):
    assert make().self_ipi(SELF_IPI, value) == vector


def test_a_local_vector_is_masked_and_can_only_be_masked():
    apic = make()
    assert apic.read(0x832) == 1 << 16
    assert apic.write(0x832, 1 << 16 | 0x31)
