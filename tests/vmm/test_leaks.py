"""Sessions come and go in one process and leave nothing behind."""

from __future__ import annotations

import gc
import os
import threading
from pathlib import Path

import pytest

from guestfault.paging.source.base import SourceError
from guestfault.vmm.session import Mode, Session


def held() -> dict[str, int]:
    """What a leak would add to."""
    gc.collect()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": Path("/proc/self/maps").read_text().count("\n"),
        "threads": len(os.listdir("/proc/self/task")),
        "thread objects": threading.active_count(),
    }


def resident() -> int:
    """Bytes of memory that the process has in use."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def grown(before: dict[str, int]) -> dict[str, int]:
    """What there is more of now, save for the few mappings that an allocator keeps."""
    more = {name: count - before[name] for name, count in held().items() if count > before[name]}
    if more.get("mappings", 0) <= 8:
        more.pop("mappings", None)
    return more


@pytest.mark.parametrize(
    ("kvm", "mode", "runs"),
    [
        ("seed", Mode.EXIT, 1000),
        ("seed", Mode.UFFD, 50),
        ("linux-6.8", Mode.UFFD, 50),
        ("kvm", Mode.UFFD, 50),
    ],
)
def test_runs_in_one_process_leak_nothing(
    open_system, session_of, snapshot, kvm, mode, runs
) -> None:
    system, taken = open_system(kvm, mode), snapshot()

    def run() -> None:
        with session_of(system, taken, mode) as session:
            assert session.run(), session.failure
            checksum = session.vcpus[0].console.checksum
        assert checksum == taken.guest.checksums[0]

    for _ in range(10):
        run()
    before, used = held(), resident()
    for _ in range(runs):
        run()
    assert grown(before) == {}
    assert resident() - used < 16 << 20


def test_sessions_that_fail_to_start_leak_nothing(open_system, snapshot, breakable) -> None:
    taken = snapshot()
    system = open_system("linux-6.8")

    def fail() -> None:
        with pytest.raises(SourceError):
            Session(system, taken, breakable(taken, {0}))

    for _ in range(5):
        fail()
    before = held()
    for _ in range(50):
        fail()
    assert grown(before) == {}
