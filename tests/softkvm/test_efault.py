"""The helper that names the failed access, its guard, what each dialect leaves in ``kvm_run``."""

import errno

import pytest

from guestfault.dialect.record import Site
from guestfault.fault.outcome import BareFault, Io, MemoryFault
from guestfault.softkvm.efault import kvm_handle_efault
from guestfault.softkvm.kvm_host import kvm_get_running_vcpu, vcpu_load, vcpu_put
from guestfault.uapi import kvm as uapi
from guestfault.uapi.mman import PROT_NONE, PROT_READ, PROT_WRITE

END = "e6f4"
DATA = 0x4_0000


@pytest.fixture
def machine(soft):
    return soft("e642 488b07" + END, rdi=DATA)


@pytest.fixture
def loaded():
    yield vcpu_load
    vcpu_put()


def untouched(machine):
    return machine.vcpu.kvm_run.exit_reason == 77 and machine.union() == b"\xa5" * 256


def test_fills_the_loaded_vcpu(machine, loaded):
    vcpu = machine.vcpu.arch
    loaded(vcpu)
    assert kvm_handle_efault(vcpu, Site.HANDLE_ERROR_PFN, 0x5000, 4096) == -errno.EFAULT
    fault = machine.vcpu.kvm_run.memory_fault
    assert machine.vcpu.kvm_run.exit_reason == 38
    assert (fault.flags, fault.gpa, fault.size) == (1, 0x5000, 4096)


@pytest.mark.parametrize("other", [False, True], ids=["none loaded", "another loaded"])
def test_writes_nothing_to_a_vcpu_that_is_not_the_loaded_one(machine, loaded, other):
    if other:
        loaded(machine.add_vcpu(1).arch)
    machine.poison_union()
    machine.vcpu.kvm_run.exit_reason = 77
    with pytest.warns(UserWarning, match="not the loaded one"):
        r = kvm_handle_efault(machine.vcpu.arch, Site.HANDLE_ERROR_PFN, 0x5000, 4096)
    assert r == -errno.EFAULT
    assert untouched(machine)


def test_without_the_guard_it_fills_whatever_it_is_given(soft):
    machine = soft(dialect="v7")
    r = kvm_handle_efault(machine.vcpu.arch, Site.HANDLE_ERROR_PFN, 0x5000, 4096)
    assert r == -errno.EFAULT
    assert machine.vcpu.kvm_run.exit_reason == 39


def test_loaded_belongs_to_the_thread(machine, loaded, background):
    loaded(machine.vcpu.arch)
    assert background(kvm_get_running_vcpu).result() is None
    assert kvm_get_running_vcpu() is machine.vcpu.arch


def test_nothing_is_loaded_after_a_run(machine):
    assert isinstance(machine.run(), Io)
    assert kvm_get_running_vcpu() is None


def test_seed_annotates_a_forbidden_page_without_the_flag(machine):
    assert isinstance(machine.run(), Io)
    machine.ram.guest.protect(DATA, 4096, PROT_NONE)
    machine.poison_union()
    assert machine.run() == MemoryFault(DATA, 4096, 1, errno.EFAULT)  # UNKNOWN
    assert machine.union()[24:] == b"\xa5" * (256 - 24)
    machine.ram.guest.protect(DATA, 4096, PROT_READ | PROT_WRITE)
    assert machine.trace() == []


def test_seed_without_the_flag_resolves_an_absent_page_in_the_kernel(machine):
    machine.write(DATA, b"contents")
    machine.discard(DATA)
    assert machine.trace() == [("out", 0x42, b"\0")]
    assert machine.regs.rax == int.from_bytes(b"contents", "little")


def test_linux_6_8_leaves_it_bare(soft):
    machine = soft("e642 488b07" + END, dialect="linux-6.8", rdi=DATA)
    assert isinstance(machine.run(), Io)
    machine.ram.guest.protect(DATA, 4096, PROT_NONE)
    machine.poison_union()
    assert machine.vcpu.run() == -errno.EFAULT
    assert machine.vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_UNKNOWN
    assert machine.union() == b"\xa5" * 256
    assert machine.run() == BareFault(errno.EFAULT)
    machine.ram.guest.protect(DATA, 4096, PROT_READ | PROT_WRITE)
    assert machine.trace() == []


def test_the_real_kvm_leaves_bare_what_the_seed_annotates(start, is_soft):
    machine = start("e642 488b07" + END, "long-cpl3", rdi=DATA)
    assert isinstance(machine.run(), Io)
    machine.ram.guest.protect(DATA, 4096, PROT_NONE)
    assert machine.vcpu.run() == -errno.EFAULT
    assert machine.vcpu.kvm_run.exit_reason == (38 if is_soft else uapi.KVM_EXIT_UNKNOWN)


def test_a_read_only_mapping_fails_a_write_and_not_a_read(machine):
    machine.ram.guest.protect(DATA, 4096, PROT_READ)
    assert machine.trace() == [("out", 0x42, b"\0")]
    regs = machine.regs
    regs.rip = machine.CODE
    machine.write(machine.CODE, bytes.fromhex("48890790"))
    machine.discard(machine.CODE)
    machine.vcpu.set_regs(regs)
    assert machine.run() == MemoryFault(DATA, 4096, 1, errno.EFAULT)
