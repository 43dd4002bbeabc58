"""Works on threads: each is begun though others sleep, and closing waits for no sleeper."""

import threading
import time

import pytest

from guestfault.softkvm.workqueue import Workqueue


@pytest.fixture
def queue():
    queue = Workqueue()
    yield queue
    queue.close()


@pytest.mark.timeout(20)
def test_works_that_sleep_keep_no_other_from_beginning(queue):
    all_here = threading.Barrier(51)
    for _ in range(50):
        queue.schedule_work(all_here.wait)
    all_here.wait(10)


@pytest.mark.timeout(20)
def test_a_thread_does_one_after_the_other(queue, until):
    done = []
    for i in range(20):
        queue.schedule_work(lambda i=i: done.append((i, threading.get_ident())))
        until(lambda i=i: len(done) == i + 1)
        time.sleep(0.001)
    assert len({thread for _, thread in done}) < 20


@pytest.mark.timeout(20)
def test_close_ends_the_idle_and_leaves_the_sleepers(queue, until, resources):
    before = resources()["threads"]
    page = threading.Event()
    dropped = []
    queue.schedule_work(page.wait)
    queue.schedule_work(lambda: None)
    began = time.monotonic()
    queue.close()
    queue.close()
    assert time.monotonic() - began < 5
    queue.schedule_work(lambda: dropped.append(1))
    assert not dropped
    page.set()
    until(lambda: resources()["threads"] <= before)  # an idle one of before may have ended


@pytest.mark.timeout(20)
def test_close_from_a_work_does_not_wait_for_itself(queue, until):
    closed = []
    queue.schedule_work(lambda: closed.append(queue.close()))
    until(lambda: closed)
