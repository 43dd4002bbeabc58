from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest

from guestfault.check import kvm
from guestfault.check.finding import Status, Use


@pytest.mark.skipif(
    not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="no /dev/kvm for this user"
)
def test_a_real_kvm_is_asked_for_every_capability() -> None:
    device, *capabilities = kvm.probe()
    assert (device.name, device.status) == ("/dev/kvm", Status.OK)
    found = {finding.name: finding for finding in capabilities}
    # Every KVM of the last ten years has these.
    assert found["SYNC_MMU"].status is Status.OK
    assert found["IMMEDIATE_EXIT"].status is Status.OK
    # None keeps what this one promises.
    info = found["MEMORY_FAULT_INFO"]
    assert info.status in (Status.LIMITED, Status.MISSING)
    if info.status is Status.LIMITED:
        assert "232" in info.detail
        assert "bare -EFAULT" in info.detail


def test_private_memory_needs_a_vm_of_a_type() -> None:
    (attributes,) = (c for c in kvm._CAPABILITIES if c.name == "MEMORY_ATTRIBUTES")
    with_type = kvm._capability(attributes, 0, types=0b11)
    assert (with_type.status, with_type.mend) == (Status.OK, "")
    assert "KVM_X86_SW_PROTECTED_VM" in with_type.detail
    without = kvm._capability(attributes, 0, types=0b01)
    assert without.status is Status.MISSING
    assert "CONFIG_KVM_SW_PROTECTED_VM" in without.mend


def test_no_device_is_one_finding_with_a_mend(tmp_path: Path) -> None:
    path = str(tmp_path / "kvm")
    (finding,) = kvm.probe(path)
    assert (finding.name, finding.status) == (path, Status.MISSING)
    assert finding.mend
    assert Use.KERNEL_KVM in finding.needed_for


def test_no_permission_names_the_user_and_the_device(
    as_nobody: Callable[[Callable[[], Any]], Any],
) -> None:
    # Not in tmp_path, which no other user can look into.
    with TemporaryDirectory() as directory:
        os.chmod(directory, 0o755)
        device = Path(directory, "kvm")
        os.mknod(device, 0o000)
        (finding,) = as_nobody(lambda: kvm.probe(str(device)))
    assert finding.status is Status.MISSING
    assert "permission denied" in finding.detail.lower()
    assert str(device) in finding.mend


def test_a_file_that_is_not_kvm_is_not_taken_for_it(tmp_path: Path) -> None:
    device = tmp_path / "kvm"
    device.touch()
    (finding,) = kvm.probe(str(device))
    assert finding.status is Status.MISSING
    assert finding.mend
