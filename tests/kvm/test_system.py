import errno
import os

import pytest

from guestfault.errors import KvmError, Unavailable
from guestfault.kvm import KvmSystem
from guestfault.kvm.system import require_api_version
from guestfault.uapi import kvm as uapi


def test_absent_device(tmp_path):
    with pytest.raises(Unavailable, match="kvm_intel or kvm_amd") as caught:
        KvmSystem(str(tmp_path / "kvm"))
    assert caught.value.what == str(tmp_path / "kvm")
    assert caught.value.why == "No such file or directory"


def test_no_permission(tmp_path):
    path = tmp_path / "kvm"
    path.touch(mode=0)
    euid = os.geteuid()
    if euid == 0:
        os.seteuid(65534)
    try:
        with pytest.raises(Unavailable, match="add yourself to its group") as caught:
            KvmSystem(str(path))
    finally:
        os.seteuid(euid)
    assert caught.value.why == "Permission denied"


@pytest.mark.parametrize(
    ("path", "why"),
    [("/dev/null", "does not answer as KVM does"), ("/proc/self", "Is a directory")],
)
def test_something_else_under_that_name(path, why):
    before = sorted(os.listdir("/proc/self/fd"))
    with pytest.raises(Unavailable, match=f"{path}: .*{why}"):
        KvmSystem(path)
    assert sorted(os.listdir("/proc/self/fd")) == before


def test_only_version_12_is_spoken():
    require_api_version("/dev/kvm", 12)
    with pytest.raises(Unavailable, match="version 11, not 12"):
        require_api_version("/dev/kvm", 11)


def test_capabilities(system):
    assert system.name == "/dev/kvm"
    assert system.check_extension(uapi.KVM_CAP_USER_MEMORY) == 1
    assert system.check_extension(99_999) == 0


def test_unknown_vm_type_is_refused_with_its_number(system):
    with pytest.raises(KvmError, match="VM type 77") as caught:
        system.create_vm(77)
    assert (caught.value.call, caught.value.errno) == ("KVM_CREATE_VM", errno.EINVAL)


def test_close_twice_and_no_use_afterwards(system):
    vm = system.create_vm()
    system.close()
    system.close()
    assert vm.check_extension(uapi.KVM_CAP_USER_MEMORY) == 1
    vm.close()
    with pytest.raises(KvmError) as caught:
        system.check_extension(uapi.KVM_CAP_USER_MEMORY)
    assert caught.value.errno == errno.EBADF


def test_nothing_is_left_open(system):
    before = sorted(os.listdir("/proc/self/fd"))
    vm = system.create_vm()
    vm.create_vcpu(0)
    vm.create_vcpu(1)
    vm.close()
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("text", "enabled"), [("Y\n", True), ("N\n", False), ("1\n", True)])
def test_two_dimensional_paging_is_a_parameter_of_the_module(
    system, tmp_path, monkeypatch, text, enabled
):
    parameter = tmp_path / "npt"
    monkeypatch.setattr("guestfault.kvm.system._TDP_PARAMETERS", (tmp_path / "ept", parameter))
    assert system.tdp_enabled is None
    parameter.write_text(text)
    assert system.tdp_enabled is enabled
