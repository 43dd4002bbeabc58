from __future__ import annotations

from pathlib import Path

import pytest
from tests.lab.conftest import bzimage

from guestfault.lab import kernels
from guestfault.lab.errors import UnknownKernelError
from guestfault.lab.kernels import choose, fetch_kernel, fetched, find_kernel

CLOUD = "-cloud-amd64"
OLD, NEW, NEWEST = f"6.12.9+deb12{CLOUD}", f"6.12.95+deb12{CLOUD}", f"6.12.95+deb12.1{CLOUD}"
RELEASES = [NEW, f"6.1.0-47{CLOUD}", OLD, "6.12.99+deb12-amd64", f"7.3.4+deb13{CLOUD}"]


@pytest.mark.parametrize(
    ("name", "release"),
    [
        ("6.12", NEW),
        ("6.12.9", OLD),
        ("6.1", f"6.1.0-47{CLOUD}"),
        ("6", NEW),
        ("7.3.4", f"7.3.4+deb13{CLOUD}"),
        (f"linux-image-{OLD}", OLD),
        ("6.12.99+deb12-amd64", "6.12.99+deb12-amd64"),
        ("linux-image-6.12.99+deb12-amd64", "6.12.99+deb12-amd64"),
        ("6.2", None),
        ("7.3.", None),
        ("", None),
        (".*", None),
    ],
)
def test_a_name_is_the_beginning_of_a_version_or_a_package(name: str, release: str | None) -> None:
    assert choose(name, RELEASES) == release
    assert choose(name, RELEASES[::-1]) == release


def test_a_rebuild_is_newer() -> None:
    assert choose("6.12", [NEW, NEWEST]) == choose("6.12", [NEWEST, NEW]) == NEWEST


def test_an_image_without_its_modules_is_passed_over() -> None:
    split, rest = "7.1.2+deb13-cloud-amd64", "7.1.1+deb13-cloud-amd64"
    names = {f"linux-image-{split}", f"linux-binary-{split}", f"linux-image-{rest}"}
    assert kernels._whole(names) == {rest}
    assert kernels._whole(names | {f"linux-modules-{split}"}) == {rest, split}


def put(store: Path, release: str, image: str) -> Path:
    path = store / "kernels" / release / image
    path.parent.mkdir(parents=True)
    path.write_bytes(bzimage(release))
    modules = store / "kernels" / release / "usr/lib/modules" / release
    modules.mkdir(parents=True, exist_ok=True)
    return modules


def test_the_image_is_found_in_one_package_and_in_several(empty_store: Path) -> None:
    modules = [
        put(empty_store, OLD, f"boot/vmlinuz-{OLD}"),
        put(empty_store, NEW, f"usr/lib/modules/{NEW}/vmlinuz"),
    ]
    (empty_store / "kernels" / ".half-made-x").mkdir()
    (empty_store / "kernels" / "6.13-not-whole").mkdir()
    assert [kernel.release for kernel in fetched()] == [OLD, NEW]
    assert [kernel.modules for kernel in fetched()] == modules
    assert find_kernel("6.12") == find_kernel(NEW) == fetched()[1]


def test_a_path_is_a_path(tmp_path: Path, empty_store: Path) -> None:
    (tmp_path / "bzImage").write_bytes(bzimage())
    assert find_kernel(str(tmp_path / "bzImage")).image == tmp_path / "bzImage"


def test_one_that_was_not_fetched_is_named_with_the_step(empty_store: Path) -> None:
    with pytest.raises(UnknownKernelError, match=r"none has been fetched yet.*lab fetch 6\.18"):
        find_kernel("6.18")
    put(empty_store, NEW, f"boot/vmlinuz-{NEW}")
    with pytest.raises(UnknownKernelError, match=r"here are 6\.12\.95"):
        find_kernel("6.18")


def test_fetching_what_is_here_asks_nobody(
    empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(empty_store, NEW, f"boot/vmlinuz-{NEW}")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert fetch_kernel("6.12").release == NEW
