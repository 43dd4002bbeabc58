"""The first process's work on a command, done here by an ordinary process."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from guestfault.lab import inside
from guestfault.lab.frames import Kind, Reader

InChild = Callable[[Callable[[], Any]], Any]


@pytest.fixture
def told(in_child: InChild, tmp_path: Path) -> Callable[..., Any]:
    """What is told when a function is called with a port, and what it returns."""

    def tell(function: Callable[[int], Any]) -> tuple[Any, list[tuple[Kind, bytes]]]:
        port = tmp_path / "port"

        def call() -> Any:
            return function(os.open(port, os.O_WRONLY | os.O_CREAT | os.O_TRUNC))

        result = in_child(call)  # it waits for every child that its process has
        return result, [tuple(frame) for frame in Reader().feed(port.read_bytes())]

    return tell


def joined(frames: Iterable[tuple[Kind, bytes]]) -> bytes:
    return b"".join(data for _, data in frames)


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_output_and_status_are_told(told: Callable[..., Any]) -> None:
    code = "import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)"
    status, frames = told(lambda port: inside._run(port, python(code), {}))
    assert status == 3
    assert joined(f for f in frames if f[0] is Kind.STDOUT) == b"out\n"
    assert joined(f for f in frames if f[0] is Kind.STDERR) == b"err\n"


def test_much_output_is_told_in_order(told: Callable[..., Any]) -> None:
    code = "import sys; sys.stdout.write(''.join(f'{n}\\n' for n in range(100000)))"
    status, frames = told(lambda port: inside._run(port, python(code), {}))
    assert status == 0
    assert joined(frames) == b"".join(b"%d\n" % n for n in range(100000))


@pytest.mark.parametrize(
    ("command", "status", "said"),
    [
        (["/nonexistent"], 127, b"/nonexistent: No such file or directory\n"),
        (["/etc/passwd"], 126, b"/etc/passwd: Permission denied\n"),
        (python("import os; os.kill(os.getpid(), 15)"), 128 + 15, b""),
    ],
)
def test_ends_are_told_as_a_shell_would(
    told: Callable[..., Any], command: list[str], status: int, said: bytes
) -> None:
    result, frames = told(lambda port: inside._run(port, command, {}))
    assert (result, joined(frames)) == (status, said)


@pytest.mark.timeout(20)
def test_what_the_command_leaves_running_is_not_waited_for(told: Callable[..., Any]) -> None:
    """A child that holds the pipes open must not hold the machine open."""
    code = "import os, time\nif os.fork() == 0: time.sleep(15)\nprint('done')"
    status, frames = told(lambda port: inside._run(port, python(code), {}))
    assert (status, joined(frames)) == (0, b"done\n")


def test_modules_get_their_parameters_from_the_command_line() -> None:
    line = "panic=-1 kvm-amd.npt=0 kvm.tdp_mmu=0 kvm_amd.vls=1 quiet -- kvm_amd.avic=1\n"
    assert inside._parameters("kvm_amd", line) == "npt=0 vls=1"
    assert inside._parameters("kvm", line) == "tdp_mmu=0"
    assert inside._parameters("ccp", line) == ""


def test_the_environment_is_the_jobs(told: Callable[..., Any]) -> None:
    code = "import os; print(os.environ['MARK'])"
    _, frames = told(lambda port: inside._run(port, python(code), {"MARK": "x"}))
    assert joined(frames) == b"x\n"


def test_files_are_sent_whole_and_missing_ones_named(
    told: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "big").write_bytes(big := os.urandom(200_000))
    (tmp_path / "empty").touch()

    def send(port: int) -> None:
        for name in ("big", "empty", "none"):
            inside._send_file(port, str(tmp_path / name))

    _, frames = told(send)
    found: dict[bytes, bytes] = {}
    for kind, payload in frames:
        path, _, data = payload.partition(b"\0")
        name = os.path.basename(path)
        found[name] = found.get(name, b"") + data
        assert (kind is Kind.MISSING) == (name == b"none")
    assert found == {b"big": big, b"empty": b"", b"none": b"No such file or directory"}
