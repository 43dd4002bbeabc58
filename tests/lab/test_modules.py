from __future__ import annotations

import gzip
import lzma
import shutil
import subprocess
from collections.abc import Callable

import pytest
from tests.lab.conftest import module

from guestfault.errors import Unavailable
from guestfault.lab.errors import NoModulesError
from guestfault.lab.image import Kernel
from guestfault.lab.modules import all_modules, modules_for

Built = Callable[..., Kernel]
KVM = "kernel/arch/x86/kvm"


def names(kernel: Kernel) -> list[str]:
    return [found.name for found in modules_for(kernel, "kvm_amd")]


def test_each_comes_after_what_it_needs(built: Built) -> None:
    kernel = built(
        {
            f"{KVM}/kvm-amd.ko": module(depends="kvm,ccp"),
            f"{KVM}/kvm.ko": module(depends="irqbypass"),
            "kernel/drivers/crypto/ccp/ccp.ko": module(),
            "kernel/virt/lib/irqbypass.ko": module(),
            f"{KVM}/kvm-intel.ko": module(depends="kvm"),
        }
    )
    assert names(kernel) == ["irqbypass", "kvm", "ccp", "kvm_amd"]


def test_a_shared_need_comes_once(built: Built) -> None:
    kernel = built(
        {
            "kvm-amd.ko": module(depends="kvm,ccp"),
            "kvm.ko": module(depends="base"),
            "ccp.ko": module(depends="base"),
            "base.ko": module(),
        }
    )
    assert names(kernel) == ["base", "kvm", "ccp", "kvm_amd"]


def test_what_is_built_in_is_not_loaded(built: Built) -> None:
    files = {"kvm-amd.ko": module(depends="kvm"), "modules.builtin": b"kernel/kvm/kvm.ko\n"}
    assert names(built(files)) == ["kvm_amd"]
    assert names(built({"modules.builtin": b"a/kvm.ko\na/kvm-amd.ko\n"})) in ([], ["kvm_amd"])


def test_each_vendor_has_its_own(built: Built) -> None:
    both = {
        "kvm-amd.ko": module(depends="kvm,ccp"),
        "kvm-intel.ko": module(depends="kvm"),
        "kvm.ko": module(),
        "ccp.ko": module(),
    }
    kernel = built(both)
    assert [found.name for found in modules_for(kernel, "kvm_intel")] == ["kvm", "kvm_intel"]
    assert [found.name for found in all_modules(kernel)] == ["kvm", "ccp", "kvm_amd", "kvm_intel"]


def test_one_vendor_is_enough(built: Built) -> None:
    kernel = built({"kvm-intel.ko": module()})
    assert [found.name for found in all_modules(kernel)] == ["kvm_intel"]
    with pytest.raises(NoModulesError, match="no module kvm_amd"):
        modules_for(kernel, "kvm_amd")


def test_there_is_to_be_one(built: Built) -> None:
    with pytest.raises(NoModulesError, match="no module kvm_amd"):
        all_modules(built({"kernel/x.ko": module()}))
    assert all_modules(built()) == []


def test_a_kernel_without_a_directory_has_none_to_load(built: Built) -> None:
    assert names(built()) == []


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".zst"])
def test_they_are_unpacked(built: Built, suffix: str) -> None:
    data = module()
    match suffix:
        case ".xz":
            packed = lzma.compress(data)
        case ".gz":
            packed = gzip.compress(data)
        case ".zst":
            if shutil.which("zstd") is None:
                pytest.skip("no zstd")
            packed = subprocess.run(["zstd", "-c"], input=data, stdout=-1, check=True).stdout
        case _:
            packed = data
    (found,) = modules_for(built({f"kvm-amd.ko{suffix}": packed}), "kvm_amd")
    assert found == ("kvm_amd", data)


def test_zstd_is_asked_for_where_it_is_needed(
    built: Built, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = built({"kvm-amd.ko.zst": b"packed"})
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Unavailable, match="install the package zstd"):
        modules_for(kernel, "kvm_amd")


@pytest.mark.parametrize(
    ("files", "why"),
    [
        ({"kernel/x.ko": module()}, "no module kvm_amd"),
        ({"kvm-amd.ko": module(depends="kvm")}, "no module kvm, which kvm_amd needs"),
        ({"kvm-amd.ko": module(release="6.1.0")}, "of 6.1.0, and the kernel is 6.99.1-lab"),
        ({"kvm-amd.ko": b"text"}, "not a kernel module"),
        ({"kvm-amd.ko.xz": b"text"}, "cannot be unpacked"),
        ({"kvm-amd.ko.xz": lzma.compress(module())[:-20]}, "cannot be unpacked"),
        ({"kvm-amd.ko.gz": gzip.compress(module())[:-20]}, "cannot be unpacked"),
    ],
)
def test_a_directory_that_does_not_serve(built: Built, files: dict[str, bytes], why: str) -> None:
    with pytest.raises(NoModulesError, match=why) as caught:
        modules_for(built(files), "kvm_amd")
    assert "\n" not in str(caught.value)
