"""What several rooms' tests need of the machine."""

from __future__ import annotations

import faulthandler
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from guestfault.errors import Unavailable
from guestfault.linux.tracefs import Tracefs
from guestfault.linux.userfaultfd import Userfaultfd

# The same examples each time where a failure must mean that the change is at fault; everywhere
# else new ones, which is how faults are found.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")

# A shell without job control has what it runs in the background ignore this, children included;
# tests send it to theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)


SERVERS = Path(__file__).parent / "servers"


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


@pytest.fixture(scope="session")
def end_of_child() -> Callable[[Callable[[], object]], int]:
    """Run a function in a child process: what it ended with, negative for a signal it died of."""

    def run(function: Callable[[], object]) -> int:
        child = os.fork()
        if child == 0:
            status = 99
            try:
                faulthandler.disable()
                resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
                status = int(bool(function()))
            except BaseException:
                traceback.print_exc()
            os._exit(status)
        _, status = os.waitpid(child, 0)
        return os.waitstatus_to_exitcode(status)

    return run


class Server:
    """One of ``tests/servers``, in a process of its own: told how to behave, killed, restarted."""

    def __init__(self, kind: str, path: Path, *more: Path) -> None:
        self._program = SERVERS / f"{kind.removesuffix('s')}_server.py"
        self._arguments = [path, *more]
        self.port = 0
        self.start()
        self.url = f"{kind}://127.0.0.1:{self.port}/guest"

    def start(self) -> None:
        """Start it, on the port that it had."""
        self._process = subprocess.Popen(
            [sys.executable, self._program, str(self.port), *self._arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline())

    def be(self, how: str) -> None:
        """Behave so from now on; ``good`` is how it begins."""
        assert self._ask(f"be {how}") == "ok"

    def stats(self) -> dict[str, int]:
        """How many ``connections`` and ``requests`` it had, and the ``most`` of them at a time."""
        found: dict[str, int] = json.loads(self._ask("stats"))
        return found

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        return self._process.stdout.readline().strip()

    def kill(self) -> None:
        """SIGKILL; its connections end with it."""
        with self._process as process:
            process.kill()


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """``serve("http" | "nbd", path)``: a server of that file, killed when the test ends.

    ``serve("https", path, pem)`` is one with a key and its certificate.
    """
    servers: list[Server] = []

    def start(kind: str, path: Path, *more: Path) -> Server:
        servers.append(Server(kind, path, *more))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


@pytest.fixture
def resources() -> Callable[[], dict[str, int]]:
    """How many descriptors, mappings and threads this process has."""

    def count() -> dict[str, int]:
        with open("/proc/self/maps") as maps:
            mappings = sum(1 for _ in maps)
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "mappings": mappings,
            "threads": len(os.listdir("/proc/self/task")),
        }

    return count


@pytest.fixture
def need_uffd() -> None:
    """Skips where no userfaultfd handles faults inside the kernel."""
    try:
        Userfaultfd.open().close()
    except Unavailable as error:
        pytest.skip(str(error))
