"""The modelled address space and userfaultfd keep the kernel's rules, as far as they have them."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import pytest

from guestfault.explore.model_mm import NO_VMA, ModelMm
from guestfault.explore.model_userfaultfd import ModelUserfaultfd
from guestfault.explore.scenario import Kind, Scenario, Verdict
from guestfault.explore.search import Bound, explore
from guestfault.linux.userfaultfd import Mode, Progress
from guestfault.memory.ram import PAGE_SIZE

BASE = 0x7F00_0000_0000
BOTH = Mode.MISSING | Mode.MINOR

pytestmark = pytest.mark.timeout(60)


@pytest.fixture
def mm() -> ModelMm:
    return ModelMm(BASE, 4)


def test_fast_gup_brings_nothing_in(mm):
    assert not mm.get_user_page_fast_only(BASE, False)
    assert mm.get_user_pages_unlocked(BASE, False) == 0
    assert mm.get_user_page_fast_only(BASE, True)
    assert mm.copy_from_user(BASE + 8, 4) == bytes(4)


def test_slow_gup_fails_as_the_mapping_says(mm):
    mm.protect(BASE, PAGE_SIZE, NO_VMA)
    assert mm.get_user_pages_unlocked(BASE, False) == -errno.EFAULT
    assert not mm.vma_is_valid(BASE, False)
    mm.pages[BASE + PAGE_SIZE].error = errno.EIO
    assert mm.get_user_pages_unlocked(BASE + PAGE_SIZE, False) == -errno.EIO
    assert mm.vma_is_valid(BASE + PAGE_SIZE, True)
    assert mm.copy_to_user(BASE + PAGE_SIZE, b"x") is False


def test_the_page_cache_outlives_the_mapping(mm):
    assert mm.copy_to_user(BASE, b"text")
    mm.discard(BASE, PAGE_SIZE)
    assert not mm.get_user_page_fast_only(BASE, False)
    assert mm.copy_from_user(BASE, 4) == b"text"
    mm.punch_hole(BASE, PAGE_SIZE)
    assert mm.copy_from_user(BASE, 4) == bytes(4)


def test_notifiers_hear_of_what_is_taken_away(mm):
    heard: list[tuple[str, bool]] = []
    mm.pages[BASE].map()
    mm.mmu_notifier_register(
        SimpleNamespace(
            invalidate_range_start=lambda *_: heard.append(("start", mm.pages[BASE].mapped)),
            invalidate_range_end=lambda *_: heard.append(("end", mm.pages[BASE].mapped)),
        )
    )
    mm.discard(BASE, PAGE_SIZE)
    assert heard == [("start", True), ("end", False)]


def test_continue_maps_what_is_cached_and_no_more(mm):
    uffd = ModelUserfaultfd(mm, sigbus=True)
    uffd.register(BASE, 3 * PAGE_SIZE, BOTH)
    mm.pages[BASE].set(b"one")
    assert mm.copy_from_user(BASE, 3) is None  # SIGBUS, though it is in the page cache
    assert uffd.continue_(BASE, PAGE_SIZE) == Progress(PAGE_SIZE, 0)
    assert mm.copy_from_user(BASE, 3) == b"one"
    assert uffd.continue_(BASE, PAGE_SIZE) == Progress(0, errno.EEXIST)
    assert uffd.continue_(BASE + PAGE_SIZE, PAGE_SIZE) == Progress(0, errno.EFAULT)
    assert uffd.continue_(BASE + 3 * PAGE_SIZE, PAGE_SIZE) == Progress(0, errno.ENOENT)


class Sleep:
    """A thread reads an absent page; another lets it in, in one of several ways."""

    def __init__(self, *, dontwake: bool, again: bool, wake: bool) -> None:
        self.mm = ModelMm(BASE, 1)
        self.mm.pages[BASE].set(b"here")
        self.uffd = ModelUserfaultfd(self.mm)
        self.uffd.register(BASE, PAGE_SIZE, BOTH)
        self.read: bytes | None = None
        self.how = dontwake, again, wake
        self.actors = {"reader": self._reader, "resolver": self._resolver}

    def _reader(self) -> None:
        self.read = self.mm.copy_from_user(BASE, 4)

    def _resolver(self) -> None:
        dontwake, again, wake = self.how
        self.uffd.continue_(BASE, PAGE_SIZE, dontwake=dontwake)
        if again:
            assert self.uffd.continue_(BASE, PAGE_SIZE).errno == errno.EEXIST
        if wake:
            self.uffd.wake(BASE, PAGE_SIZE)

    def verdict(self, *, stuck: str | None) -> Verdict:
        if stuck is not None:
            return Verdict(Kind.STUCK, stuck)
        return Verdict(Kind.CORRECT if self.read == b"here" else Kind.MEMORY)

    def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("dontwake", "again", "wake", "kinds"),
    [
        (False, False, False, {Kind.CORRECT}),
        (True, False, True, {Kind.CORRECT}),
        (True, False, False, {Kind.CORRECT, Kind.STUCK}),
        # EEXIST wakes nobody: whoever is asleep stays so.
        (True, True, False, {Kind.CORRECT, Kind.STUCK}),
    ],
)
def test_who_sleeps_is_woken_by_a_wake_and_by_nothing_else(dontwake, again, wake, kinds):
    """Invariant: no wake-up is lost, in whatever order, and EEXIST is none."""

    def build(_dialect: object) -> Sleep:
        return Sleep(dontwake=dontwake, again=again, wake=wake)

    search = explore(Scenario("sleep", "", "", build), None, Bound(4))
    assert set(search.tally.counts) == kinds
    assert not search.beyond
