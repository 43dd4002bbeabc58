"""The layout of ``struct kvm_run``, and how its members are reached: no compiler needed."""

from __future__ import annotations

from ctypes import sizeof

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.uapi import kvm as uapi


def test_sizes() -> None:
    assert sizeof(uapi.kvm_run) == 2352
    assert sizeof(uapi.kvm_regs) == 144
    assert sizeof(uapi.kvm_sregs) == 312
    assert sizeof(uapi.kvm_sync_regs) <= uapi.SYNC_REGS_SIZE_BYTES


@pytest.mark.parametrize(
    ("field", "offset", "size"),
    [
        ("request_interrupt_window", 0, 1),
        ("immediate_exit", 1, 1),
        ("exit_reason", 8, 4),
        ("flags", 14, 2),
        ("cr8", 16, 8),
        ("apic_base", 24, 8),
        ("io", 32, 16),
        ("mmio", 32, 24),
        ("internal", 32, 136),
        ("memory_fault", 32, 24),
        ("padding", 32, 256),
        ("kvm_valid_regs", 288, 8),
        ("kvm_dirty_regs", 296, 8),
        ("s", 304, 2048),
    ],
)
def test_fields_lie_where_the_kernel_puts_them(field: str, offset: int, size: int) -> None:
    descriptor = getattr(uapi.kvm_run, field)
    assert (descriptor.offset, descriptor.size) == (offset, size)


def test_members_of_the_union_share_their_bytes() -> None:
    run = uapi.kvm_run()
    run.memory_fault.flags = uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE
    run.memory_fault.gpa = 0x100123
    run.memory_fault.size = 0x1000
    assert run.mmio.phys_addr == uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE
    assert bytes(run.mmio.data) == (0x100123).to_bytes(8, "little")
    assert (run.mmio.len, run.mmio.is_write) == (0x1000, 0)


def test_exit_reasons_are_distinct() -> None:
    # The types of Hyper-V and Xen exits, the flags and the directions share the prefix only.
    others = ("IO_IN", "IO_OUT", "HYPERV_", "XEN_", "HYPERCALL_")
    reasons = [
        value
        for name, value in vars(uapi).items()
        if (bare := name.removeprefix("KVM_EXIT_")) != name and not bare.startswith(others)
    ]
    assert sorted(reasons) == list(range(44))


@given(st.binary(min_size=2352, max_size=2352))
def test_any_page_can_be_viewed(page: bytes) -> None:
    run = uapi.kvm_run.from_buffer_copy(page)
    assert run.exit_reason == int.from_bytes(page[8:12], "little")
    assert run.memory_fault.gpa == int.from_bytes(page[40:48], "little")
    assert bytes(run) == page
