from __future__ import annotations

import os
from mmap import PAGESIZE
from pathlib import Path

import pytest

from guestfault.linux import mapped_file as module
from guestfault.linux import vma
from guestfault.linux.mapped_file import in_page_cache, mapped_file
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd


def look(address: int, pid: int | str = "self") -> module.MappedFile | None:
    found = vma.find(address, pid, flags=True)
    assert found is not None
    return mapped_file(found, address, pid)


def test_what_a_memfd_holds_is_known_without_touching_it() -> None:
    with Memfd("ram", 4 * PAGESIZE) as file, Mapping.from_memfd(file) as guest:
        os.pwrite(file.fd, b"x", PAGESIZE + 7)
        pages = [guest.address + page * PAGESIZE for page in range(3)]
        found = [look(address) for address in pages]
        assert [f and f.has_page for f in found] == [False, True, False]
        assert [in_page_cache(address) for address in pages] == [False, True, False]
        assert found[0] is not None
        assert (found[0].size, found[0].capacity) == (4 * PAGESIZE, 0)


@pytest.mark.parametrize("way", ["map_files", "/fd/"])
def test_each_way_to_a_file_without_a_name(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = module._paths
    monkeypatch.setattr(module, "_paths", lambda *a: [p for p in paths(*a) if way in p])
    if way == "map_files" and os.geteuid():
        pytest.skip("needs CAP_CHECKPOINT_RESTORE for /proc/PID/map_files")
    with Memfd("ram", 4 * PAGESIZE) as file, Mapping.from_memfd(file) as guest:
        found = look(guest.address, os.getpid())
        assert found is not None
        assert found.size == 4 * PAGESIZE


def test_a_file_by_name_must_be_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = module._paths
    monkeypatch.setattr(module, "_paths", lambda *a: [p for p in paths(*a) if "/root" in p])
    path = tmp_path / "ram"
    path.write_bytes(bytes(PAGESIZE))
    with Memfd("unused", PAGESIZE) as file, Mapping.from_memfd(file) as guest:
        real = vma.find(guest.address, flags=True)
        assert real is not None
        status = path.stat()
        named = vma.Vma(
            **{
                **{field: getattr(real, field) for field in real.__slots__},
                "path": str(path),
                "deleted": False,
                "inode": status.st_ino,
                "dev": (os.major(status.st_dev), os.minor(status.st_dev)),
            }
        )
        found = mapped_file(named, guest.address)
        assert found is not None
        assert found.capacity > 0
        path.rename(tmp_path / "moved")
        (tmp_path / "ram").write_bytes(b"")
        assert mapped_file(named, guest.address) is None


def test_memory_without_a_file() -> None:
    with Mapping.anonymous(PAGESIZE) as memory:
        assert look(memory.address) is None


def test_device_files_are_left_alone() -> None:
    zero = vma.Vma(0, 4096, True, True, False, True, 0, (0, 6), 0, "/dev/null", False)
    status = os.stat("/dev/null")
    device = (os.major(status.st_dev), os.minor(status.st_dev))
    null = vma.Vma(0, 4096, True, True, False, True, 0, device, status.st_ino, "/dev/null", False)
    assert mapped_file(zero, 0) is None
    assert mapped_file(null, 0) is None


def test_nothing_mapped_is_in_no_cache() -> None:
    assert in_page_cache(0) is None
