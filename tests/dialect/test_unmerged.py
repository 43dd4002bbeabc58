"""What was never merged, laid out as its patches have it."""

from __future__ import annotations

from ctypes import sizeof

from hypothesis import given
from hypothesis import strategies as st

from guestfault.dialect import unmerged
from guestfault.dialect.unmerged import kvm_run_v5, speculative_exit
from guestfault.uapi import kvm as uapi


def test_the_second_union_follows_the_synchronised_registers() -> None:
    registers = uapi.kvm_run.s
    assert kvm_run_v5.speculative_exit.offset == registers.offset + registers.size == 2352
    assert kvm_run_v5.speculative_exit.size == 256
    assert sizeof(kvm_run_v5) == 2608
    assert kvm_run_v5.s.offset == registers.offset


def test_the_released_part_is_untouched() -> None:
    assert issubclass(kvm_run_v5, uapi.kvm_run)
    for name in ("exit_reason", "flags", "mmio", "memory_fault", "kvm_valid_regs"):
        assert getattr(kvm_run_v5, name).offset == getattr(uapi.kvm_run, name).offset


@given(st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1), st.integers(0, 2**64 - 1))
def test_both_sides_see_the_same_words(flags: int, gpa: int, length: int) -> None:
    area = bytearray(3 * 4096)
    kernel = speculative_exit(memoryview(area))
    kernel.flags, kernel.gpa, kernel.len = flags, gpa, length
    user = kvm_run_v5.from_buffer(area)
    seen = user.speculative_exit.memory_fault
    assert (seen.flags, seen.gpa, seen.len) == (flags, gpa, length)
    words = [int.from_bytes(area[2352 + i : 2360 + i], "little") for i in (0, 8, 16)]
    assert words == [flags, gpa, length]
    assert not any(area[:2352])
    assert not any(area[2376:])


def test_numbers() -> None:
    # _IOWR(KVMIO, 0xd2, bool): not KVM_SET_MEMORY_ATTRIBUTES, which has the ordinal today.
    assert unmerged.KVM_SET_MEM_FAULT_NOWAIT == 0xC001AED2
    assert uapi.KVM_SET_MEMORY_ATTRIBUTES == 0x4020AED2
    # None of the released bits of kvm_run.flags and of a slot's flags is taken twice.
    assert unmerged.KVM_RUN_MEMORY_FAULT_FILLED == 0x100
    released = uapi.KVM_MEM_LOG_DIRTY_PAGES | uapi.KVM_MEM_READONLY | uapi.KVM_MEM_GUEST_MEMFD
    assert unmerged.KVM_MEM_USERFAULT & released == 0
