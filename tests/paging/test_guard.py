from __future__ import annotations

import pytest

from guestfault.fault.access import Access, FoundBy
from guestfault.paging.guard import FaultLoopError, RepeatGuard
from guestfault.uapi.kvm_x86 import kvm_regs

LIMIT = 4


class Registers:
    """A vCPU's, and how often it was asked for them."""

    def __init__(self) -> None:
        self.now = kvm_regs(rip=0x1000)
        self.reads = 0

    def __call__(self) -> kvm_regs:
        self.reads += 1
        return self.now


@pytest.fixture
def registers() -> Registers:
    return Registers()


@pytest.fixture
def guard(registers: Registers) -> RepeatGuard:
    return RepeatGuard(3, registers, LIMIT)


def access(gpa: int) -> Access:
    return Access(gpa=gpa, size=8, found_by=FoundBy.ANNOTATION)


def test_the_same_fault_may_come_limit_times_and_not_once_more(guard: RepeatGuard) -> None:
    for i in range(LIMIT):
        guard.saw(access(0x5000 + 8 * i))  # one page
    with pytest.raises(FaultLoopError) as caught:
        guard.saw(access(0x5FF8))
    error = caught.value
    assert (error.vcpu_id, error.rip, error.count) == (3, 0x1000, LIMIT + 1)
    assert error.access.gpa == 0x5FF8
    assert "vCPU 3 at rip 0x1000" in str(error)
    assert "gpa 0x5ff8" in str(error)


def test_progress_starts_the_count_again(guard: RepeatGuard) -> None:
    for _ in range(5 * LIMIT):
        guard.saw(access(0x5000))
        guard.progress()


def test_another_page_in_between_starts_the_count_again(guard: RepeatGuard) -> None:
    for _ in range(5 * LIMIT):
        guard.saw(access(0x5000))
        guard.saw(access(0x6000))


@pytest.mark.parametrize("name", ["rip", "rdi", "rax", "r15", "rflags"])
def test_any_register_that_has_moved_starts_the_count_again(
    guard: RepeatGuard, registers: Registers, name: str
) -> None:
    """With RIP alone, a loop over pages whose faults all go to the page of the code would stop."""
    for _ in range(5 * LIMIT):
        guard.saw(access(0x5000))
        setattr(registers.now, name, getattr(registers.now, name) + 4)


@pytest.mark.parametrize("name", ["rip", "rcx"])
def test_a_loop_that_begins_after_a_change_is_still_found(
    guard: RepeatGuard, registers: Registers, name: str
) -> None:
    for _ in range(LIMIT):
        guard.saw(access(0x5000))
    setattr(registers.now, name, 4)
    for _ in range(LIMIT):
        guard.saw(access(0x5000))
    with pytest.raises(FaultLoopError):
        guard.saw(access(0x5000))


def test_registers_are_read_from_the_second_fault_on_a_page_on(
    guard: RepeatGuard, registers: Registers
) -> None:
    for page in range(10):
        guard.saw(access(page * 4096))
    assert registers.reads == 0
    guard.saw(access(9 * 4096))
    assert registers.reads == 1


def test_accesses_whose_address_is_unknown_are_never_the_same(guard: RepeatGuard) -> None:
    for _ in range(5 * LIMIT):
        guard.saw(Access(gpa=None, size=8, found_by=FoundBy.DECODE))
