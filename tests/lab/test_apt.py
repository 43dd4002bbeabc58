"""Against the real apt, which is never let on the network here: the mirror is a directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from guestfault.errors import Unavailable
from guestfault.lab.apt import PrivateApt, find_mirror, unpack
from guestfault.lab.errors import FetchError, StorageError, UnknownKernelError
from guestfault.lab.kernels import fetch_kernel

needs_apt = pytest.mark.skipif(shutil.which("apt-get") is None, reason="no apt-get here")


@needs_apt
def test_the_mirror_is_one_of_the_systems_own() -> None:
    try:
        mirror = find_mirror()
    except Unavailable as error:
        pytest.skip(str(error))  # on a system whose sources name no Debian mirror
    assert ":" in mirror
    assert not mirror.endswith("/dists")


@needs_apt
def test_a_mirror_without_the_suite_is_one_line(tmp_path: Path) -> None:
    apt = PrivateApt(tmp_path / "apt", f"file:{tmp_path}/nothing", ["trixie"])
    with pytest.raises(FetchError, match="cannot get the list of trixie") as caught:
        apt.update()
    assert "\n" not in str(caught.value)


@needs_apt
def test_unreachable_suites_are_named(tmp_path: Path, empty_store: Path) -> None:
    with pytest.raises(UnknownKernelError, match=r"not reachable: trixie \(") as caught:
        fetch_kernel("6.12", mirror=f"file:{tmp_path}/nothing", suites=["trixie"])
    assert "\n" not in str(caught.value)
    assert not (empty_store / "kernels").exists()


@needs_apt
def test_all_of_its_state_is_in_its_directory(tmp_path: Path) -> None:
    apt = PrivateApt(tmp_path / "apt", f"file:{tmp_path}/nothing", ["trixie"])
    assert apt.names("linux-image-") == []
    text = (tmp_path / "apt" / "apt.conf").read_text()
    assert f'Dir::State "{tmp_path}/apt"' in text
    sources = (tmp_path / "apt" / "sources.list").read_text()
    assert sources.count("\n") == 1
    assert sources.endswith(f"file:{tmp_path}/nothing trixie main\n")


def test_without_apt_it_says_what_else_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Unavailable, match="--kernel PATH"):
        find_mirror()


def test_a_store_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="Not a directory"):
        PrivateApt(tmp_path / "file" / "apt", "file:/nothing", ["trixie"])


@pytest.mark.skipif(shutil.which("dpkg") is None, reason="no dpkg here")
def test_a_damaged_package_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "x.deb").write_bytes(b"not a package")
    with pytest.raises(FetchError, match=r"cannot unpack x\.deb") as caught:
        unpack(tmp_path / "x.deb", tmp_path)
    assert "\n" not in str(caught.value)
