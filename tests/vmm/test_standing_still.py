"""A fault that never comes back: KVM retries for ever, and no exit tells anyone."""

from __future__ import annotations

from typing import Any

import pytest

from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.walk import Walk
from guestfault.linux.mmu_notifier import invalidating
from guestfault.memory.ram import PAGE_SIZE
from guestfault.paging.guard import FaultLoopError
from guestfault.paging.watchdog import Watchdog
from guestfault.softkvm.mm import HostMm
from guestfault.softkvm.system import SoftSystem
from guestfault.vmm.report import report
from guestfault.vmm.session import Session


class NeverReady(HostMm):
    """Every look at one page ends in an invalidation, as long as it is ``stuck``: KVM starts over.

    What an asynchronous page fault that fails does in the kernel: no result, no exit, once more.
    """

    def __init__(self) -> None:
        super().__init__()
        self.page = -1
        self.stuck = lambda: True
        self.looks = 0

    def _spoil(self, hva: int) -> bool:
        if hva // PAGE_SIZE != self.page or not self.stuck():
            return False
        self.looks += 1
        with invalidating(self.page * PAGE_SIZE, (self.page + 1) * PAGE_SIZE):
            return True

    def get_user_page_fast_only(self, hva: int, write: bool) -> bool:
        return self._spoil(hva) or super().get_user_page_fast_only(hva, write)

    def get_user_pages_unlocked(self, hva: int, write: bool, **how: Any) -> int:
        return 0 if self._spoil(hva) else super().get_user_pages_unlocked(hva, write, **how)


@pytest.fixture
def mm(monkeypatch: pytest.MonkeyPatch) -> NeverReady:
    mm = NeverReady()
    monkeypatch.setattr("guestfault.softkvm.system.HostMm", lambda: mm)
    return mm


def stuck_at(session: Session, mm: NeverReady, page: int) -> None:
    mm.page = (session.ram.guest.address + page * PAGE_SIZE) // PAGE_SIZE
    for loop in session.vcpus:
        loop.watchdog = Watchdog(patience=0.05)


@pytest.mark.timeout(30)
def test_the_watchdog_finds_the_page_and_the_guest_runs_on(
    session_of, snapshot, layout_of, mm
) -> None:
    taken = snapshot(1 << 19, GuestMode.LONG_CPL3, Walk.RANDOM)
    page = layout_of(taken).data[20]
    with session_of(SoftSystem("linux-6.8"), taken) as session:
        mm.stuck = lambda: not session.pager.is_in(page * PAGE_SIZE)
        stuck_at(session, mm, page)
        assert session.run(interval=0.01)
        result = report(session, 0)
    assert result.verdict == "right"
    assert result.vcpus[0].silent == 1
    assert mm.looks > 3


@pytest.mark.timeout(30)
def test_a_guest_that_spins_on_pages_it_has_is_left_alone(session_of, snapshot, layout_of) -> None:
    taken = snapshot(1 << 19, GuestMode.LONG_CPL3)
    with session_of(SoftSystem("linux-6.8"), taken) as session:
        [loop] = session.vcpus
        code = layout_of(taken).code * PAGE_SIZE
        session.ram.bytes[code : code + 2] = b"\xeb\xfe"  # jmp .
        loop.watchdog = Watchdog(patience=0.02)
        looks = 0

        def watch() -> None:
            nonlocal looks
            looks += 1
            if looks == 30:
                session.stop()

        assert not session.run(watch, interval=0.02)
        assert session.failure is None
        assert loop.resolver.account.faults == 0


@pytest.mark.timeout(30)
def test_a_page_that_is_in_and_still_never_ready_ends_with_the_account(
    session_of, snapshot, layout_of, mm
) -> None:
    taken = snapshot(1 << 19, GuestMode.LONG_CPL3, Walk.RANDOM)
    page = layout_of(taken).data[20]
    with session_of(SoftSystem("linux-6.8"), taken) as session:
        stuck_at(session, mm, page)
        looks = 0

        def watch() -> None:
            nonlocal looks
            looks += 1
            if looks == 200:
                session.stop()

        assert not session.run(watch, interval=0.02)
        failure = session.failure
    assert isinstance(failure, FaultLoopError)
    assert failure.access.gpa is not None
    assert failure.access.gpa // PAGE_SIZE == page
