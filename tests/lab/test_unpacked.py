from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from guestfault.errors import Unavailable
from guestfault.lab.errors import FetchError
from guestfault.lab.unpacked import environment_of, fetch_unpacked, said_by


def test_libraries_of_the_directory_come_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_LIBRARY_PATH", "/mine")
    path = environment_of(Path("/root"))["LD_LIBRARY_PATH"].split(":")
    assert path[0] == "/root/usr/lib/x86_64-linux-gnu"
    assert path[-1] == "/mine"
    assert environment_of(None) == dict(os.environ)


def test_what_a_program_says_or_why_it_does_not() -> None:
    assert said_by(["sh", "-c", "echo out; echo err >&2"], None, dict(os.environ)) == "out\nerr\n"
    with pytest.raises(Unavailable, match="/nonexistent: does not start: No such file"):
        said_by(["/nonexistent"], None, {})
    with pytest.raises(Unavailable, match=r"sh: does not run: no; remove /kept and fetch it again"):
        said_by(["sh", "-c", "echo no >&2; exit 3"], Path("/kept"), dict(os.environ))


def fetch(final: Path, mirror: str) -> None:
    fetch_unpacked(
        "Bochs",
        ["bochs"],
        final,
        backports=False,
        works=lambda _root: None,
        mirror=mirror,
        say=lambda _text: None,
    )


def test_another_system_has_to_install_it(
    empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guestfault.lab.unpacked.codename", lambda: None)
    with pytest.raises(Unavailable, match="for Debian, which this system is not; install Bochs"):
        fetch(empty_store / "bochs", "file:/nothing")


@pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt-get here")
def test_a_mirror_that_has_it_not_is_one_line(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("guestfault.lab.unpacked.codename", lambda: "bookworm")
    with pytest.raises(FetchError, match="cannot get the list of bookworm") as caught:
        fetch(empty_store / "bochs", f"file:{tmp_path}/nothing")
    assert "\n" not in str(caught.value)
    assert not (empty_store / "bochs").exists()
