"""SIGBUS sent, held, taken, and let go; and what cannot be held."""

from __future__ import annotations

import os
import signal
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.linux.sigbus import Sigbus, SigbusHeld, send_sigbus, take_sigbus

pytestmark = pytest.mark.timeout(60)
PAGE = 4096


def is_blocked() -> bool:
    return signal.SIGBUS in signal.pthread_sigmask(signal.SIG_BLOCK, [])


@given(address=st.integers(0, 2**47 - 1), lsb=st.integers(0, 30), required=st.booleans())
def test_what_was_sent_is_taken_and_once(address, lsb, required):
    with SigbusHeld():
        assert take_sigbus() is None
        send_sigbus(address, lsb, action_required=required)
        assert take_sigbus() == Sigbus(address, lsb, required)
        assert take_sigbus() is None


def test_the_threads_mask_is_restored_and_nothing_left_pending():
    assert not is_blocked()
    with SigbusHeld():
        assert is_blocked()
        send_sigbus(0x1000, 12)
    assert not is_blocked()
    assert signal.SIGBUS not in signal.sigpending()


def test_held_within_held():
    with SigbusHeld():
        with SigbusHeld():
            send_sigbus(0x1000, 12)
        assert is_blocked()
        assert take_sigbus() is None


def test_a_thread_takes_its_own():
    """Invariant: what one vCPU's thread is sent, no other is told."""
    meet = threading.Barrier(2, timeout=20)
    taken = {}

    def one(address: int) -> None:
        with SigbusHeld():
            send_sigbus(address, 12)
            meet.wait()
            taken[address] = take_sigbus()
            meet.wait()

    threads = [threading.Thread(target=one, args=(address,)) for address in (0x1000, 0x2000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert taken == {address: Sigbus(address, 12, True) for address in (0x1000, 0x2000)}


def test_who_does_not_hold_it_dies_of_it(end_of_child):
    def unprepared() -> None:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        send_sigbus(0x1000, 12)

    assert end_of_child(unprepared) == -signal.SIGBUS


def test_one_that_somebody_sent_does_what_it_would_have_done(end_of_child):
    def killed() -> None:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        with SigbusHeld():
            os.kill(os.getpid(), signal.SIGBUS)
            take_sigbus()

    assert end_of_child(killed) == -signal.SIGBUS


@pytest.mark.parametrize("to_thread", [False, True])
def test_a_handler_gets_one_that_somebody_sent_and_not_the_other(to_thread):
    seen = []
    before = signal.signal(signal.SIGBUS, lambda number, _: seen.append(number))
    try:
        with SigbusHeld():
            if to_thread:
                signal.pthread_kill(threading.get_ident(), signal.SIGBUS)
            else:
                os.kill(os.getpid(), signal.SIGBUS)
            assert seen == []
            assert take_sigbus() is None
            assert seen == [signal.SIGBUS]
            assert is_blocked()
            send_sigbus(0x1000, 12)
            assert take_sigbus() == Sigbus(0x1000, 12, True)
        assert seen == [signal.SIGBUS]
    finally:
        signal.signal(signal.SIGBUS, before)


@pytest.mark.parametrize("held", [False, True])
def test_an_access_of_our_own_past_the_end_of_a_file_ends_the_process(end_of_child, held):
    """The kernel forces that signal on the thread, held or not."""

    def touches() -> int:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        with Memfd("short", 2 * PAGE) as file, Mapping.from_memfd(file) as mapping:
            view = mapping.view()
            file.truncate(PAGE)
            if held:
                SigbusHeld().__enter__()
            return view[PAGE]

    assert end_of_child(touches) == -signal.SIGBUS
