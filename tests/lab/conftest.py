"""Small writers of what the lab reads, and the real machine where there is one."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from guestfault.errors import GuestfaultError
from guestfault.lab.bochs import find_bochs
from guestfault.lab.image import Kernel
from guestfault.lab.kernels import fetch_kernel, fetched, find_kernel
from guestfault.lab.qemu import fetch_qemu, find_qemu

RELEASE = "6.99.1-lab"

Built = Callable[..., Kernel]
"""The fixture ``built``."""


def bzimage(release: str = RELEASE, *, size: int = 4096) -> bytes:
    """A file with the header of an x86 kernel, and nothing to run in it."""
    setup, version_at = 4, 0x300
    data = bytearray((setup + 1) * 512 + size)
    data[0x1F1] = setup
    data[0x1F4:0x1F8] = (size // 16).to_bytes(4, "little")
    data[0x1FE:0x200] = b"\x55\xaa"
    data[0x202:0x206] = b"HdrS"
    data[0x20E:0x210] = (version_at - 0x200).to_bytes(2, "little")
    text = f"{release} (builder@host) #1 SMP".encode() + b"\0"
    data[version_at : version_at + len(text)] = text
    return bytes(data)


def module(*, depends: str = "", release: str = RELEASE) -> bytes:
    """A kernel module that has a ``.modinfo`` section, and nothing to run in it."""
    info = b"license=GPL\0" + f"depends={depends}\0vermagic={release} SMP mod_unload \0".encode()
    names = b"\0.modinfo\0.shstrtab\0"
    info_at, names_at = 64, 64 + len(info)
    sections_at = (names_at + len(names) + 7) // 8 * 8
    head = b"\x7fELF\x02\x01\x01".ljust(16, b"\0")
    head += struct.pack("<HHIQQQIHHHHHH", 1, 62, 1, 0, 0, sections_at, 0, 64, 0, 0, 64, 3, 2)
    sections = bytes(64)
    sections += struct.pack("<IIQQQQIIQQ", 1, 1, 2, 0, info_at, len(info), 0, 0, 1, 0)
    sections += struct.pack("<IIQQQQIIQQ", 10, 3, 0, 0, names_at, len(names), 0, 0, 1, 0)
    return (head + info + names).ljust(sections_at, b"\0") + sections


def entries(archive: bytes) -> dict[str, tuple[int, bytes]]:
    """Path to mode and content, of archives one behind the other, as the kernel reads them."""
    found, at = {}, 0
    while at < len(archive):
        assert at % 4 == 0
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * n : at + 14 + 8 * n], 16) for n in range(13)]
        mode, size, length = fields[1], fields[6], fields[11]
        name = archive[at + 110 : at + 110 + length]
        assert name.endswith(b"\0")
        data_at = (at + 110 + length + 3) // 4 * 4
        if name != b"TRAILER!!!\0":
            path = "/" + name[:-1].decode("utf-8", "surrogateescape")
            for parent in Path(path).parents:
                assert parent == Path("/") or str(parent) in found, f"{path} before its directory"
            found[path] = mode, archive[data_at : data_at + size]
        at = (data_at + size + 3) // 4 * 4
    return found


@pytest.fixture
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The lab's store, with nothing in it; it is not made yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "guestfault" / "lab"


@pytest.fixture
def built(tmp_path: Path) -> Callable[..., Kernel]:
    """Write an image, and files by their path in its modules directory."""

    def build(files: dict[str, bytes] | None = None) -> Kernel:
        image = tmp_path / "boot" / "bzImage"
        image.parent.mkdir(exist_ok=True)
        image.write_bytes(bzimage())
        directory = tmp_path / "lib" / "modules" / RELEASE
        for path, data in (files or {}).items():
            (directory / path).parent.mkdir(parents=True, exist_ok=True)
            (directory / path).write_bytes(data)
        return Kernel(image, RELEASE, directory if files else None)

    return build


@pytest.fixture(scope="session")
def lab_kernel() -> Kernel:
    """A kernel that really boots.  Nothing is downloaded unless ``GUESTFAULT_LAB`` names one."""
    wanted = os.environ.get("GUESTFAULT_LAB")
    try:
        if wanted:
            fetch_qemu()
            return fetch_kernel(wanted)
        find_qemu()
        here = fetched()
    except GuestfaultError as error:
        pytest.skip(f"the lab: {error}")
    if not here:
        pytest.skip("the lab: no kernel fetched; guestfault lab fetch 7.3, or GUESTFAULT_LAB=7.3")
    return here[-1]


@pytest.fixture(scope="session")
def intel_kernel() -> Kernel:
    """One to be started under Bochs: a minute each time, so only where somebody asks for it."""
    wanted = os.environ.get("GUESTFAULT_LAB_INTEL")
    if not wanted:
        pytest.skip("the lab: GUESTFAULT_LAB_INTEL names no kernel to start under Bochs")
    try:
        find_bochs()
        return find_kernel(wanted)
    except GuestfaultError as error:
        pytest.skip(f"the lab: {error}")


@pytest.fixture(scope="session")
def protected_kernel() -> Kernel:
    """One that has private memory, which somebody has built."""
    try:
        find_qemu()
        found = [kernel for kernel in fetched() if kernel.release.endswith("-sw-protected")]
    except GuestfaultError as error:
        pytest.skip(f"the lab: {error}")
    if not found:
        pytest.skip(
            "the lab: no kernel with private memory; scripts/sw-protected-kernel.sh builds one,"
            " guestfault lab add keeps it"
        )
    return found[-1]
