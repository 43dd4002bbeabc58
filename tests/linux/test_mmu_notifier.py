import threading

import pytest

from guestfault.linux import mmu_notifier
from guestfault.linux.mmu_notifier import invalidating

pytestmark = pytest.mark.timeout(20)


class Listener:
    def __init__(self, name="", log=None):
        self.name = name
        self.log = [] if log is None else log

    def invalidate_range_start(self, start, end):
        self.log.append((self.name, "start", start, end))

    def invalidate_range_end(self, start, end):
        self.log.append((self.name, "end", start, end))


@pytest.fixture
def registered():
    on_chain = []

    def register(listener):
        mmu_notifier.register(listener)
        on_chain.append(listener)
        return listener

    yield register
    for listener in on_chain:
        mmu_notifier.unregister(listener)


def test_every_notifier_hears_start_before_and_end_after(registered):
    log = []
    registered(Listener("a", log))
    registered(Listener("b", log))
    with invalidating(0x1000, 0x3000):
        log.append("body")
    assert log == [
        ("a", "start", 0x1000, 0x3000),
        ("b", "start", 0x1000, 0x3000),
        "body",
        ("a", "end", 0x1000, 0x3000),
        ("b", "end", 0x1000, 0x3000),
    ]


def test_the_end_comes_when_the_body_raises(registered):
    listener = registered(Listener())
    with pytest.raises(ZeroDivisionError), invalidating(0, 1):
        raise ZeroDivisionError
    assert [entry[1] for entry in listener.log] == ["start", "end"]


def test_a_start_that_raises_ends_only_what_was_started(registered):
    class Broken(Listener):
        def invalidate_range_start(self, start, end):
            raise ZeroDivisionError

    first, last = registered(Listener()), Listener()
    registered(Broken())
    registered(last)
    with pytest.raises(ZeroDivisionError), invalidating(0, 1):
        pass
    assert [entry[1] for entry in first.log] == ["start", "end"]
    assert last.log == []


def test_one_who_registers_during_an_invalidation_hears_of_it(registered):
    late = Listener()
    with invalidating(0x1000, 0x2000):
        registered(late)
        assert late.log == [("", "start", 0x1000, 0x2000)]
    assert late.log[1:] == [("", "end", 0x1000, 0x2000)]


def test_one_who_unregisters_during_an_invalidation_hears_its_end():
    leaver = Listener()
    mmu_notifier.register(leaver)
    with invalidating(1, 2):
        mmu_notifier.unregister(leaver)
    with invalidating(3, 4):
        pass
    assert leaver.log == [("", "start", 1, 2), ("", "end", 1, 2)]


def test_unregistering_a_stranger_is_an_error():
    with pytest.raises(ValueError, match="not in list"):
        mmu_notifier.unregister(Listener())


def test_starts_and_ends_balance_under_threads():
    """Whenever one comes and goes, it hears one end for every start, and not before it."""
    stop = threading.Event()

    def invalidate():
        while not stop.is_set():
            with invalidating(1, 2):
                pass

    class Counter:
        def __init__(self):
            self.lock = threading.Lock()
            self.starts = self.ends = 0

        def invalidate_range_start(self, start, end):
            with self.lock:
                self.starts += 1

        def invalidate_range_end(self, start, end):
            with self.lock:
                self.ends += 1
                assert self.ends <= self.starts

    threads = [threading.Thread(target=invalidate) for _ in range(3)]
    for thread in threads:
        thread.start()
    counters = [Counter() for _ in range(300)]
    for counter in counters:
        mmu_notifier.register(counter)
        with invalidating(5, 6):
            pass
        mmu_notifier.unregister(counter)
    stop.set()
    for thread in threads:
        thread.join()
    assert all(counter.starts == counter.ends >= 1 for counter in counters)
