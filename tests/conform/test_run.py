"""What keeps one case from harming another: the watch, the child, the skips."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from typing import Any

import pytest

from guestfault.conform.case import CASES, Case
from guestfault.conform.record import Result
from guestfault.conform.run import _in_child, run_case, run_cases
from guestfault.conform.watch import NeverReturnedError, Watched
from guestfault.errors import GuestfaultError, KernelError
from guestfault.softkvm.system import SoftSystem

NORMAL = CASES["normal/read/cpl3"]


def scripted(name: str, script: Any) -> Case:
    return replace(NORMAL, name=name, script=lambda *_: script())


@pytest.mark.timeout(20)
def test_a_call_that_comes_back_is_not_said_to_sleep() -> None:
    watched = Watched(lambda: 7)
    assert watched.wait(10) is None
    assert watched.result() == 7


@pytest.mark.timeout(20)
def test_a_call_that_sleeps_is_found_asleep_and_one_that_loops_running() -> None:
    reader, writer = os.pipe()
    asleep = Watched(lambda: len(os.read(reader, 1)))
    assert asleep.wait(0.1) == {"state": "sleeping"}
    os.write(writer, b".")
    assert asleep.wait(10) is None
    assert asleep.result() == 1
    stop = time.monotonic() + 1.5
    busy = Watched(lambda: next(i for i in range(1 << 62) if time.monotonic() > stop))
    states = {(busy.wait(0.05) or {}).get("state") for _ in range(10)}
    assert "running" in states
    assert busy.wait(10) is None
    busy.result()
    os.close(reader)
    os.close(writer)


@pytest.mark.timeout(20)
def test_what_a_watched_call_raises_is_raised() -> None:
    def fail() -> int:
        raise KernelError("read", 5)

    watched = Watched(fail)
    assert watched.wait(10) is None
    with pytest.raises(KernelError):
        watched.result()


def test_nothing_runs_after_a_case_that_hangs() -> None:
    """The process has lost a thread: what it says after that is worth nothing."""

    def hang() -> Result:
        raise NeverReturnedError("KVM_RUN")

    def succeed() -> Result:
        return Result("", "completes")

    cases = [scripted("a", succeed), scripted("b", hang), scripted("c", succeed)]
    with_results = run_cases(SoftSystem(), cases)
    assert [results[0].word for results in with_results.values()] == [
        "completes",
        "hangs",
        "skipped",
    ]
    assert with_results["c"][0].why == "b never came back; nothing ran after it"


def test_a_case_that_cannot_be_set_up_fails_alone() -> None:
    def fail() -> Result:
        raise GuestfaultError("no such thing")

    result = run_case(SoftSystem(), scripted("a", fail))
    assert (result.word, result.why) == ("failed", "no such thing")


@pytest.mark.timeout(20)
def test_the_result_of_a_child() -> None:
    result = _in_child(SoftSystem(), scripted("a", lambda: Result("", "bare", value="0x1")))
    assert result == Result("a", "bare", value="0x1")


@pytest.mark.timeout(20)
def test_a_child_that_is_killed_says_by_what() -> None:
    result = _in_child(SoftSystem(), scripted("a", lambda: os.kill(os.getpid(), signal.SIGKILL)))
    assert result == Result("a", "killed by SIGKILL")


@pytest.mark.timeout(20)
def test_a_child_that_hangs_is_a_result() -> None:
    def hang() -> Result:
        raise NeverReturnedError("KVM_PRE_FAULT_MEMORY (again)")

    result = _in_child(SoftSystem(), scripted("a", hang))
    assert result.word == "hangs"
    assert "KVM_PRE_FAULT_MEMORY (again)" in result.why


@pytest.mark.timeout(60)
def test_nothing_is_left_behind(resources: Any) -> None:
    """Each case closes its VM, its memory and its userfaultfd, however it ends."""
    system = SoftSystem("linux-7.3")
    cases = [
        CASES[f"{c}/read/cpl3"] for c in ("normal", "missing", "unmapped", "wp-sigbus", "gmem")
    ]
    run_cases(system, cases)
    before = resources()
    run_cases(system, cases)
    after = resources()
    system.close()
    assert after["descriptors"] <= before["descriptors"]
    assert after["mappings"] <= before["mappings"] + 4  # Python's own memory may grow
    assert after["threads"] <= before["threads"] + 1
