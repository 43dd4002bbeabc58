"""Sleeping and waiting one's turn, with real threads and under a scheduler."""

import signal
import threading

import pytest

from guestfault.softkvm.preempt import Mutex, Sleeper, scheduled_by


class Recorder:
    """A scheduler for one thread, for which every wait must be over."""

    def __init__(self, before_wait=lambda: None):
        self.names = []
        self.before_wait = before_wait

    def point(self, name, shared, write):
        self.names.append((name, shared, write))

    def wait(self, name, shared, until, acts=False):
        self.names.append((name, shared, until()))
        self.before_wait()
        assert until()


@pytest.mark.timeout(10)
def test_a_call_before_the_sleep_is_not_lost():
    """prepare, look, sleep: whoever calls after prepare ends the sleep."""
    sleeper = Sleeper("wait")
    sleeper.prepare("prepare")
    sleeper.wake_up("call")
    sleeper.wake_up("call again")
    sleeper.sleep("sleep")


@pytest.mark.timeout(10)
def test_a_call_before_prepare_does_not_count(background):
    sleeper = Sleeper("wait")
    sleeper.wake_up("call")
    sleeper.prepare("prepare")
    asleep = background(sleeper.sleep, "sleep")
    assert asleep.is_running()
    sleeper.wake_up("call")
    asleep.result()


@pytest.mark.timeout(10)
def test_a_signal_handler_may_call():
    """On the sleeping thread itself, in the midst of the sleep: no lock of ours is in the way."""
    sleeper = Sleeper("wait")
    old = signal.signal(signal.SIGALRM, lambda *_: sleeper.wake_up("handler"))
    try:
        for _ in range(20):
            sleeper.prepare("prepare")
            signal.setitimer(signal.ITIMER_REAL, 0.002)
            sleeper.sleep("sleep")
    finally:
        signal.signal(signal.SIGALRM, old)


def test_under_a_scheduler_it_is_the_scheduler_s_business():
    sleeper = Sleeper("wait")
    recorder = Recorder(lambda: sleeper.wake_up("call"))
    with scheduled_by(recorder):
        sleeper.prepare("prepare")
        sleeper.sleep("sleep")
    assert recorder.names == [("prepare", "wait", True), ("sleep", "wait", False),
                              ("call", "wait", True)]  # fmt: skip


@pytest.mark.timeout(10)
def test_a_mutex_excludes_threads():
    mutex, inside, seen = Mutex("mutex"), [], []

    def work():
        for _ in range(200):
            with mutex:
                inside.append(1)
                seen.append(len(inside))
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(seen) == {1}


def test_a_mutex_under_a_scheduler():
    mutex, recorder = Mutex("mutex"), Recorder()
    with scheduled_by(recorder):
        with mutex:
            assert recorder.names == [("mutex_lock", "mutex", True)]
        assert recorder.names[1:] == [("mutex_unlock", "mutex", True)]
        with mutex:
            pass


def test_a_mutex_is_let_go_when_its_holder_raises():
    mutex = Mutex("mutex")
    with pytest.raises(ValueError, match="why"), mutex:
        raise ValueError("why")
    with mutex:
        pass
