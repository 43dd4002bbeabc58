"""When a vCPU that stands still is looked at, and when that counts."""

from __future__ import annotations

from guestfault.paging.watchdog import Watchdog


def test_a_vcpu_that_comes_and_goes_is_never_overdue() -> None:
    watchdog = Watchdog(patience=1)
    for now in range(10):
        watchdog.entering()
        assert not watchdog.overdue(now)
        watchdog.left()
        assert not watchdog.overdue(now + 0.5)


def test_one_that_stays_inside_is_overdue_once_in_a_patience() -> None:
    watchdog = Watchdog(patience=1)
    watchdog.entering()
    overdue = [watchdog.overdue(t / 2) for t in range(8)]
    assert overdue == [False, False, True, False, True, False, True, False]


def test_the_same_rip_counts_only_after_kicks_of_its_own_and_in_a_row() -> None:
    watchdog = Watchdog(patience=1, looks=3)
    assert not watchdog.stands_still(0x1000)  # somebody else's kick
    seen = []
    for now, rip in enumerate([0x1000, 0x1000, 0x2000, 0x1000, 0x1000, 0x1000]):
        watchdog.entering()
        watchdog.overdue(10 * now)
        assert watchdog.overdue(10 * now + 1)
        watchdog.left()
        seen.append(watchdog.stands_still(rip))
    assert seen == [False, False, False, False, False, True]


def test_an_exit_of_its_own_is_progress() -> None:
    watchdog = Watchdog(patience=1, looks=2)
    for now in range(4):
        watchdog.entering()
        watchdog.overdue(10 * now)
        assert watchdog.overdue(10 * now + 1)
        watchdog.left()
        assert not watchdog.stands_still(0x1000)
        watchdog.progress()
