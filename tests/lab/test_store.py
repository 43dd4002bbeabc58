from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from guestfault.lab.errors import StorageError
from guestfault.lab.store import making_directory, store, storing, write_file


def test_it_follows_the_xdg_specification(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store() == tmp_path / "guestfault" / "lab"
    monkeypatch.setenv("HOME", "/home/somebody")
    for nothing in ("", "relative/path"):
        monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert store() == Path("/home/somebody/.cache/guestfault/lab")


def visible(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir() if path.name != ".lock")


def test_a_directory_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    final = tmp_path / "kernels" / "6.99"

    def interrupted() -> None:
        with making_directory(final) as half:
            (half / "vmlinuz").write_bytes(b"half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert visible(final.parent) == []
    with making_directory(final) as half:
        (half / "vmlinuz").write_bytes(b"whole")
        assert not final.exists()
    assert (final / "vmlinuz").read_bytes() == b"whole"
    assert visible(final.parent) == ["6.99"]


KILLED = """
import sys, time
from pathlib import Path
from guestfault.lab.store import making_directory
with making_directory(Path(sys.argv[1])) as half:
    (half / "vmlinuz").write_bytes(b"half")
    print("half", flush=True)
    time.sleep(60)
"""


@pytest.mark.timeout(30)
def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    final = tmp_path / "6.99"
    child = subprocess.Popen([sys.executable, "-c", KILLED, final], stdout=subprocess.PIPE)
    with child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"half\n"
        child.send_signal(signal.SIGKILL)
    assert len(visible(tmp_path)) == 1
    with making_directory(final) as half:
        (half / "vmlinuz").write_bytes(b"whole")
    assert visible(tmp_path) == ["6.99"]


MAKER = """
import sys, time
from pathlib import Path
from guestfault.lab.store import making_directory
with making_directory(Path(sys.argv[1])) as half:
    (half / "one").write_text(sys.argv[2])
    time.sleep(0.1)
    (half / "other").write_text(sys.argv[2])
"""


@pytest.mark.timeout(60)
def test_two_at_once_do_not_mix(tmp_path: Path) -> None:
    """Invariant: a directory of the store is all of one maker, whoever else makes it meanwhile."""
    final = tmp_path / "6.99"
    makers = [subprocess.Popen([sys.executable, "-c", MAKER, final, mark]) for mark in ("a", "b")]
    assert [maker.wait() for maker in makers] == [0, 0]
    assert (final / "one").read_text() == (final / "other").read_text()
    assert visible(tmp_path) == ["6.99"]


def test_a_full_disk_is_one_line_that_names_the_file() -> None:
    with pytest.raises(StorageError) as caught, storing("/dev/full"):
        Path("/dev/full").write_bytes(b"x")
    assert caught.value.errno == errno.ENOSPC
    assert "\n" not in str(caught.value)
    assert "No space left on device" in str(caught.value)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path: Path) -> None:
    final = tmp_path / "layers" / "x"
    write_file(final, b"1")
    before = os.listdir(final.parent)
    with pytest.raises(TypeError):
        write_file(final, "not bytes")  # type: ignore[arg-type]
    assert os.listdir(final.parent) == before
    assert final.read_bytes() == b"1"
