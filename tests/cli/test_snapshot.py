"""``guestfault snapshot`` and running what it makes, from files and from servers."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import guestfault
from guestfault.guest.snapshot import Snapshot

pytestmark = pytest.mark.timeout(60)

MAIN = "import sys; from guestfault.cli.main import main; sys.exit(main())"
COMMAND = [sys.executable, "-c", MAIN]
ENVIRONMENT = os.environ | {"PYTHONPATH": str(Path(guestfault.__file__).parents[1])}


def call(*words: object) -> subprocess.CompletedProcess[str]:
    command = [*COMMAND, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, env=ENVIRONMENT, timeout=50)


def complaint(done: subprocess.CompletedProcess[str]) -> str:
    assert (done.returncode, done.stdout) == (2, ""), done
    [line] = done.stderr.splitlines()
    return line.removeprefix("guestfault: ")


@pytest.fixture(scope="module")
def packed(taken: Snapshot, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "guest.packed"
    done = call("snapshot", "pack", taken.path, path, "--block-size", "8K")
    assert (done.returncode, done.stderr) == (0, "")
    size = path.stat().st_size
    says = f"{path}: {size} bytes for 1048576 of memory (128 blocks, 0 of zeros, 0 copies)\n"
    assert done.stdout == says
    return path


def test_a_packed_snapshot_runs(packed: Path) -> None:
    done = call("run", "--kvm", "soft", packed)
    assert (done.returncode, done.stderr) == (0, "")
    assert "verdict            right" in done.stdout


def test_and_is_a_directory_again(packed: Path, taken: Snapshot, tmp_path: Path) -> None:
    done = call("snapshot", "unpack", packed, tmp_path / "again")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    for name in ("memory", "vcpus.json", "manifest.json"):
        assert (tmp_path / "again" / name).read_bytes() == (taken.path / name).read_bytes()


@pytest.mark.parametrize("kind", ["http", "nbd"])
def test_it_runs_and_unpacks_from_a_server(packed: Path, serve, tmp_path: Path, kind: str) -> None:
    url = serve(kind, packed).url
    done = call("run", "--kvm", "soft", "--verify", "--json", url)
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout)["verdict"] == "right"
    assert call("snapshot", "unpack", url, tmp_path / "x").returncode == 0
    assert call("run", "--kvm", "soft", tmp_path / "x").returncode == 0


@pytest.mark.parametrize("kind", ["http", "nbd"])
def test_memory_from_elsewhere(taken: Snapshot, serve, kind: str) -> None:
    url = serve(kind, taken.memory_path).url
    done = call("run", "--kvm", "soft", "--memory-from", url, taken.path)
    assert (done.returncode, done.stderr) == (0, "")
    assert "verdict            right" in done.stdout


def start(*words: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "run", "--kvm", "soft", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )


def test_it_waits_for_a_server_that_is_killed_and_says_so(packed: Path, serve) -> None:
    server = serve("http", packed)
    server.be("delay 0.02")
    with start("--source-wait", "forever", server.url) as running:
        assert running.stderr is not None
        while server.stats()["requests"] < 30:
            time.sleep(0.01)
        server.kill()
        line = running.stderr.readline()
        assert line.startswith("guestfault: waiting for the source: ")
        assert line.endswith(f"{server.url}: Connection refused\n")
        time.sleep(0.3)
        assert running.poll() is None
        server.start()
        out, errors = running.communicate(timeout=30)
    assert running.returncode == 0
    assert errors == "guestfault: the source is back\n"
    assert "verdict            right" in out


def test_it_stops_when_its_patience_is_at_its_end(packed: Path, serve) -> None:
    server = serve("http", packed)
    server.be("delay 0.02")
    with start("--source-wait", "0.5", server.url) as running:
        while server.stats()["requests"] < 30:
            time.sleep(0.01)
        server.kill()
        began = time.monotonic()
        out, errors = running.communicate(timeout=30)
    assert time.monotonic() - began < 3
    assert running.returncode == 2
    assert "Connection refused; tried" in errors.splitlines()[-1]
    assert "in 0.5 s (vCPU" in errors.splitlines()[-1]
    assert "verdict            not done" in out


def test_a_lie_stops_it_with_the_block_and_where_it_is(packed: Path, serve) -> None:
    server = serve("http", packed)
    server.be("delay 0.02")
    with start(server.url) as running:
        while server.stats()["requests"] < 30:
            time.sleep(0.01)
        server.be("wrong bytes")
        out, errors = running.communicate(timeout=30)
    assert running.returncode == 2
    [line] = errors.splitlines()
    assert line.startswith("guestfault: page source: 4096 bytes at 0x")
    assert "of the packed file, is damaged: " in line
    assert "verdict            not done" in out


@pytest.mark.parametrize("when", ["while it runs", "before it starts"])
def test_ctrl_c_ends_the_wait_for_a_server_that_hangs(packed: Path, serve, when: str) -> None:
    server = serve("http", packed)
    server.be("delay 0.02" if when == "while it runs" else "stall")
    with start("--source-timeout", "600", server.url) as running:
        while server.stats()["requests"] < (30 if when == "while it runs" else 1):
            time.sleep(0.01)
        server.be("stall")
        time.sleep(0.2)
        running.send_signal(signal.SIGINT)
        began = time.monotonic()
        out, errors = running.communicate(timeout=30)
    assert time.monotonic() - began < 2
    assert running.returncode == 130
    assert errors == ""
    assert ("not done" in out) == (when == "while it runs")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["snapshot", "pack", "/nowhere", "x"], "snapshot /nowhere: there is no such directory"),
        (["snapshot", "pack", "--block-size", "some", "a", "b"], "--block-size some: not a size"),
        (["snapshot", "unpack", "/dev/null", "x"], "/dev/null: it is not a packed snapshot"),
        (["run", "--memory-from", "x"], "--memory-from is for the memory of a SNAPSHOT"),
        (["run", "http://127.0.0.1:1/x"], "snapshot http://127.0.0.1:1/x: Connection refused"),
        (["run", "nbds://h/x"], "no pages can be had by nbds"),
    ],
)
def test_bad_input_is_one_line_and_status_2(words: list[str], says: str) -> None:
    assert says in complaint(call(*words))


@pytest.mark.parametrize("wait", ["-1", "nan", "soon", "inf"])
def test_a_patience_that_is_none(wait: str) -> None:
    done = call("run", f"--source-wait={wait}")
    assert done.returncode == 2
    assert "argument --source-wait: invalid seconds value" in done.stderr
