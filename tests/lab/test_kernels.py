from __future__ import annotations

from pathlib import Path

import pytest
from tests.lab.conftest import RELEASE, Built, bzimage, module

from guestfault.lab import kernels
from guestfault.lab.errors import NoModulesError, NotAKernelError, UnknownKernelError
from guestfault.lab.image import Kernel
from guestfault.lab.kernels import add_kernel, choose, fetch_kernel, fetched, find_kernel
from guestfault.lab.modules import all_modules

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


# -- added ones ----------------------------------------------------------------------------------


def test_an_added_kernel_is_there_when_its_tree_is_gone(built: Built, empty_store: Path) -> None:
    files = {
        "kernel/arch/x86/kvm/kvm-amd.ko": module(depends="kvm"),
        "kernel/arch/x86/kvm/kvm.ko": module(),
        "kernel/drivers/other.ko": module(),
    }
    kernel = built(files)
    wanted = all_modules(kernel)
    added = add_kernel(kernel)
    kernel.image.unlink()
    assert added == find_kernel(RELEASE) == fetched()[0]
    assert added.image.read_bytes() == bzimage()
    assert all_modules(added) == wanted
    assert [module.name for module in wanted] == ["kvm", "kvm_amd"]
    assert add_kernel(added) == added  # itself, again


def test_an_added_kernel_with_kvm_built_in_has_no_modules(built: Built, empty_store: Path) -> None:
    added = add_kernel(built())
    assert added.modules is None
    assert find_kernel(RELEASE) == added


def test_a_newer_build_takes_the_place_of_the_older(built: Built, empty_store: Path) -> None:
    add_kernel(built({"kvm-amd.ko": module()}))
    assert add_kernel(Kernel(built().image, RELEASE, None)).modules is None
    assert len(fetched()) == 1


def test_what_cannot_be_added_leaves_nothing(built: Built, empty_store: Path) -> None:
    with pytest.raises(NoModulesError, match="no module kvm, which kvm_amd needs"):
        add_kernel(built({"kvm-amd.ko": module(depends="kvm")}))
    with pytest.raises(NotAKernelError, match="no name for a directory"):
        add_kernel(Kernel(built().image, "../7.3", None))
    assert fetched() == []
