from __future__ import annotations

import threading
import time

import pytest

from guestfault.paging.source.base import (
    SourceError,
    SourceInterruptedError,
    SourceUnavailableError,
    interrupt,
    resume,
    trouble,
)
from guestfault.paging.source.blocks import CachedSource
from guestfault.paging.source.resilient import FOREVER, Patience, ResilientSource


class Failing:
    """It fails ``times`` times with ``kind`` before each read that it answers."""

    size = 1 << 20

    def __init__(self, times: int, kind: type[SourceError] = SourceUnavailableError) -> None:
        self.times = self.left = times
        self.kind = kind
        self.at: list[float] = []

    def read_into(self, offset: int, buffer: memoryview) -> None:
        self.at.append(time.monotonic())
        self.left -= 1
        if self.left >= 0:
            buffer[:1] = b"\xee"
            raise self.kind(offset, len(buffer), "gone")
        self.left = self.times
        buffer[:] = b"x" * len(buffer)


QUICK = Patience(wait=5, first=0.001, limit=0.01)


def read(source, offset: int = 0) -> bytes:
    buffer = bytearray(10)
    source.read_into(offset, memoryview(buffer))
    return bytes(buffer)


def test_it_tries_again_until_it_has_it() -> None:
    source = ResilientSource(Failing(4), QUICK)
    assert read(source) == b"x" * 10
    assert source.retries == 4
    assert trouble(source) is None


def test_no_patience_is_one_try() -> None:
    inner = Failing(1)
    with pytest.raises(SourceUnavailableError, match=r"gone$"):
        read(ResilientSource(inner, Patience(wait=0)))
    assert len(inner.at) == 1


def test_patience_has_an_end_that_is_kept_and_told() -> None:
    inner = Failing(10**9)
    began = time.monotonic()
    with pytest.raises(SourceUnavailableError, match=r"gone; tried \d+ times in 0.3 s") as caught:
        read(ResilientSource(inner, Patience(0.3, 0.01, 0.05)), 4096)
    assert 0.3 <= time.monotonic() - began < 0.6
    assert (caught.value.offset, caught.value.length) == (4096, 10)


def test_the_pauses_double_up_to_a_limit_and_are_not_all_alike() -> None:
    inner = Failing(9)
    read(ResilientSource(inner, Patience(FOREVER, 0.01, 0.08)))
    pauses = [b - a for a, b in zip(inner.at, inner.at[1:], strict=False)]
    for n, pause in enumerate(pauses):
        full = min(0.08, 0.01 * 2**n)
        assert full / 2 <= pause < full + 0.05


def test_a_lie_is_not_waited_for() -> None:
    inner = Failing(1, SourceError)
    with pytest.raises(SourceError, match="gone"):
        read(ResilientSource(inner, QUICK))
    assert len(inner.at) == 1


@pytest.mark.timeout(10)
def test_while_it_waits_it_says_why_and_can_be_interrupted_through_what_stands_upon_it() -> None:
    inner = Failing(10**9)
    source = CachedSource(ResilientSource(inner, Patience(FOREVER, 5, 5)), 4096)
    ended: list[float] = []

    def reader() -> None:
        with pytest.raises(SourceInterruptedError):
            read(source)
        ended.append(time.monotonic())

    thread = threading.Thread(target=reader)
    thread.start()
    while trouble(source) is None:
        time.sleep(0.001)
    assert trouble(source).why == "gone"
    began = time.monotonic()
    interrupt(source)
    thread.join()
    assert ended[0] - began < 0.2
    assert trouble(source) is None
    with pytest.raises(SourceInterruptedError):
        read(source)
    resume(source)
    inner.left = inner.times = 0
    assert read(source) == b"x" * 10
