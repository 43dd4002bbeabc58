from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from guestfault.lab.given import Given


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["pipe", "socket"])
def test_an_end_that_is_given_away_closes_with_whoever_has_it(kind: str) -> None:
    """Invariant: when an emulator ends, what is read from it ends, however it was opened."""
    with ExitStack() as stack:
        given = Given(stack)
        theirs = getattr(given, kind)("console")
        with pytest.raises(BlockingIOError):
            os.read(given.console.fileno(), 1)
        which = f"'/proc/self/fd/{theirs}'" if kind == "pipe" else str(theirs)
        says = f"import sys; open({which}, 'wb').write(b'said'); sys.stdin.read()"
        child = subprocess.Popen(
            [sys.executable, "-c", says],
            stdin=subprocess.PIPE,
            pass_fds=given.descriptors,
        )
        with child:
            given.started()
            os.set_blocking(given.console.fileno(), True)
            assert os.read(given.console.fileno(), 99) == b"said"
        assert os.read(given.console.fileno(), 99) == b""


def test_memory_can_be_read_by_name_and_from_its_beginning() -> None:
    with ExitStack() as stack:
        given = Given(stack)
        descriptor = given.memory("disk", [b"one", b"two"])
        assert given.descriptors == [descriptor]
        assert os.read(descriptor, 9) == b"onetwo"
        with open(f"/proc/self/fd/{descriptor}", "rb") as file:
            assert file.read() == b"onetwo"


def test_nothing_stays_open(resources: Callable[[], dict[str, int]]) -> None:
    before = resources()["descriptors"]
    with ExitStack() as stack:
        given = Given(stack)
        given.memory("disk", [b"x"])
        given.pipe("console")
        given.socket("port")
        assert resources()["descriptors"] == before + 5
        given.started()
        assert resources()["descriptors"] == before + 3
    assert resources()["descriptors"] == before
