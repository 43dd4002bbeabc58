"""What several rooms' tests need of the machine."""

from __future__ import annotations

import os
import pickle
import shutil
import subprocess
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from guestfault.linux.tracefs import Tracefs

# The same examples each time where a failure must mean that the change is at fault; everywhere
# else new ones, which is how faults are found.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")


@pytest.fixture(scope="session")
def tracefs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracefs]:
    """This kernel's tracefs, mounted for nobody but us.

    A child mounts it in a mount namespace of its own; it is reached through the child's root
    directory in /proc, and gone when the child ends.
    """
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("no unshare(1), to mount tracefs where nobody else sees it")
    where = tmp_path_factory.mktemp("tracefs")
    script = 'mount -t tracefs none "$1" && echo mounted && read end'
    child = subprocess.Popen(
        [unshare, "--mount", "--propagation", "private", "sh", "-c", script, "sh", str(where)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    with child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        if child.stdout.readline() != "mounted\n":
            pytest.skip(f"tracefs cannot be mounted: {child.stderr.read().strip()}")
        yield Tracefs(Path(f"/proc/{child.pid}/root{where}"))
        child.stdin.close()


@pytest.fixture(scope="session")
def in_child() -> Callable[[Callable[[], Any]], Any]:
    """Run a function in a child process, which it may spoil or end, and return its result."""
    return _in_child


def _in_child(function: Callable[[], Any]) -> Any:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        try:
            answer = ("result", function())
        except BaseException:
            answer = ("failure", traceback.format_exc())
        with os.fdopen(writer, "wb") as pipe:
            pickle.dump(answer, pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as pipe:
        pickled = pipe.read()
    os.waitpid(child, 0)
    kind, value = pickle.loads(pickled)
    assert kind == "result", value
    return value
