from __future__ import annotations

import pytest

from guestfault.fault.access import Access, FoundBy
from guestfault.paging.guard import FaultLoopError, RepeatGuard

LIMIT = 4


class Rip:
    """Where a vCPU stands, and how often it was asked."""

    def __init__(self) -> None:
        self.value = 0x1000
        self.reads = 0

    def __call__(self) -> int:
        self.reads += 1
        return self.value


@pytest.fixture
def rip() -> Rip:
    return Rip()


@pytest.fixture
def guard(rip: Rip) -> RepeatGuard:
    return RepeatGuard(3, rip, LIMIT)


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


def test_another_rip_starts_the_count_again(guard: RepeatGuard, rip: Rip) -> None:
    for _ in range(5 * LIMIT):
        guard.saw(access(0x5000))
        rip.value += 4


def test_a_loop_that_begins_after_a_change_of_rip_is_still_found(
    guard: RepeatGuard, rip: Rip
) -> None:
    for _ in range(LIMIT):
        guard.saw(access(0x5000))
    rip.value += 4
    for _ in range(LIMIT):
        guard.saw(access(0x5000))
    with pytest.raises(FaultLoopError):
        guard.saw(access(0x5000))


def test_rip_is_read_from_the_second_fault_on_a_page_on(guard: RepeatGuard, rip: Rip) -> None:
    for page in range(10):
        guard.saw(access(page * 4096))
    assert rip.reads == 0
    guard.saw(access(9 * 4096))
    assert rip.reads == 1


def test_accesses_whose_address_is_unknown_are_never_the_same(guard: RepeatGuard) -> None:
    for _ in range(5 * LIMIT):
        guard.saw(Access(gpa=None, size=8, found_by=FoundBy.DECODE))
