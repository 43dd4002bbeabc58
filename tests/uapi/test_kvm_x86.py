"""Structures that end in a flexible array."""

from __future__ import annotations

from ctypes import addressof, sizeof

from hypothesis import given
from hypothesis import strategies as st

from guestfault.uapi import kvm as uapi


@given(st.integers(0, 300))
def test_flexible_has_room_for_its_entries(count: int) -> None:
    cpuid = uapi.flexible(uapi.kvm_cpuid2, count)()
    assert isinstance(cpuid, uapi.kvm_cpuid2)
    assert len(cpuid.entries) == count
    assert sizeof(cpuid) == 8 + 40 * count


def test_flexible_entries_lie_where_the_header_ends() -> None:
    msrs = uapi.flexible(uapi.kvm_msrs, 2)()
    msrs.nmsrs = 2
    msrs.entries[1].index = 0xC0000080
    assert addressof(msrs.entries) - addressof(msrs) == sizeof(uapi.kvm_msrs) == 8
    assert bytes(msrs)[24:28] == bytes.fromhex("800000c0")


def test_an_ioctl_of_a_flexible_structure_counts_its_header() -> None:
    assert uapi.KVM_SET_CPUID2 == 0x4008AE90
    assert uapi.KVM_SET_SIGNAL_MASK == 0x4004AE8B
