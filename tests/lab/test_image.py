from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.lab.conftest import RELEASE, bzimage

from guestfault.lab.errors import NoModulesError, NotAKernelError, StorageError
from guestfault.lab.image import open_kernel


def test_the_release_is_read_from_the_header(tmp_path: Path) -> None:
    (tmp_path / "bzImage").write_bytes(bzimage("7.4.0-rc1-mine"))
    kernel = open_kernel(tmp_path / "bzImage")
    assert (kernel.release, kernel.modules) == ("7.4.0-rc1-mine", None)


@pytest.mark.parametrize("below", ["lib/modules", "usr/lib/modules", "."])
def test_modules_are_found_below_a_directory_that_is_given(tmp_path: Path, below: str) -> None:
    (tmp_path / "bzImage").write_bytes(bzimage())
    directory = tmp_path / "staging" / below / RELEASE
    directory.mkdir(parents=True)
    assert open_kernel(tmp_path / "bzImage", tmp_path / "staging").modules == directory
    assert open_kernel(tmp_path / "bzImage", directory).modules == directory


def test_modules_are_found_beside_an_image(tmp_path: Path) -> None:
    for name in ("boot/vmlinuz", f"lib/modules/{RELEASE}/vmlinuz"):
        image = tmp_path / name
        image.parent.mkdir(parents=True)
        image.write_bytes(bzimage())
    directory = tmp_path / "lib" / "modules" / RELEASE
    assert open_kernel(tmp_path / "boot" / "vmlinuz").modules == directory
    assert open_kernel(directory / "vmlinuz").modules == directory


def test_a_tree_that_was_built_is_its_own_modules_directory(tmp_path: Path) -> None:
    (tmp_path / "arch/x86/boot").mkdir(parents=True)
    (tmp_path / "arch/x86/kvm").mkdir()
    image = tmp_path / "arch/x86/boot/bzImage"
    image.write_bytes(bzimage())
    assert open_kernel(tmp_path).modules is None  # KVM is built in
    (tmp_path / "arch/x86/kvm/kvm-amd.ko").touch()
    assert open_kernel(tmp_path).modules == tmp_path
    assert open_kernel(image).modules == tmp_path


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (b"", "HdrS"),
        (b"#!/bin/sh\n" * 100, "HdrS"),
        (b"\x7fELF\x02\x01".ljust(600, b"\0"), "arch/x86/boot/bzImage"),
        (bzimage()[:3000], "cut short: 3000 bytes of 6656"),
        (bzimage()[:0x300] + bytes(6000), "names no release"),
    ],
)
def test_what_is_no_kernel_is_told_in_one_line(tmp_path: Path, data: bytes, why: str) -> None:
    path = tmp_path / "image"
    path.write_bytes(data)
    with pytest.raises(NotAKernelError, match=why) as caught:
        open_kernel(path)
    assert caught.value.path == path
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_no_built_tree(tmp_path: Path) -> None:
    with pytest.raises(NotAKernelError, match="build it first"):
        open_kernel(tmp_path)


def test_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        open_kernel(tmp_path / "image")
    (tmp_path / "image").write_bytes(bzimage())
    with pytest.raises(NoModulesError, match=f"no such directory, where the modules of {RELEASE}"):
        open_kernel(tmp_path / "image", tmp_path / "none")
    with pytest.raises(NoModulesError, match="not a directory"):
        open_kernel(tmp_path / "image", tmp_path / "image")


@given(st.binary(max_size=64), st.integers(0x1F0, 0x220))
def test_a_damaged_header_is_a_kernel_or_an_error(
    tmp_path_factory: pytest.TempPathFactory, damage: bytes, at: int
) -> None:
    path = tmp_path_factory.mktemp("damaged") / "image"
    data = bytearray(bzimage())
    data[at : at + len(damage)] = damage
    path.write_bytes(data)
    with suppress(NotAKernelError):
        assert open_kernel(path).release
