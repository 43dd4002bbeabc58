"""KVM's own copies: what they fail on, and which dialects say so on the way to something else."""

import errno
from dataclasses import replace

import pytest

from guestfault.dialect.published import DIALECTS
from guestfault.dialect.record import Enabling, Site
from guestfault.dialect.unmerged import KVM_RUN_MEMORY_FAULT_FILLED
from guestfault.fault.outcome import Io, Mmio, RamMmio
from guestfault.softkvm.guest_access import (
    kvm_mmu_gva_to_gpa,
    kvm_vcpu_read_guest_page,
    kvm_vcpu_write_guest_page,
)
from guestfault.softkvm.kvm_host import vcpu_load, vcpu_put
from guestfault.softkvm.page_track import kvm_slot_page_track_add_page
from guestfault.softkvm.refusal import GuestException
from guestfault.uapi import kvm as uapi
from guestfault.uapi.mman import PROT_NONE, PROT_READ
from guestfault.x86.paging import AccessKind

END = "e6f4"
DATA = 0x4_0000
DEVICE = 0x20_0000
ANNOTATING = [name for name, d in DIALECTS.items() if Site.VCPU_READ_GUEST_PAGE in d.annotated]
SILENT = [name for name in DIALECTS if name not in ANNOTATING]


@pytest.fixture
def vcpu(soft):
    machine = soft()
    arch = machine.vcpu.arch
    arch.load_sregs()
    arch.machine = machine
    vcpu_load(arch)
    yield arch
    vcpu_put()


def opted_in(machine):
    info = machine.vm.kvm.dialect.info
    if info is not None and info.enabling is Enabling.OPT_IN:
        machine.vm.enable_cap(info.number, (1,))
    return machine


def test_they_go_to_the_slot_s_memory(vcpu):
    machine = vcpu.machine
    assert kvm_vcpu_write_guest_page(vcpu, DATA + 5, b"abc")
    assert machine.bytes[DATA + 5 : DATA + 8] == b"abc"
    assert kvm_vcpu_read_guest_page(vcpu, DATA + 4, 4) == b"\0abc"
    assert not vcpu.kvm.second_stage.sptes  # no entry was needed


def test_what_they_fail_on(vcpu):
    machine = vcpu.machine
    assert kvm_vcpu_read_guest_page(vcpu, DEVICE, 1) is None
    assert not kvm_vcpu_write_guest_page(vcpu, DEVICE, b"x")
    machine.ram.guest.protect(DATA, 4096, PROT_READ)
    assert kvm_vcpu_read_guest_page(vcpu, DATA, 1) == b"\0"
    assert not kvm_vcpu_write_guest_page(vcpu, DATA, b"x")
    machine.ram.guest.protect(DATA, 4096, PROT_NONE)
    assert kvm_vcpu_read_guest_page(vcpu, DATA, 1) is None


def test_a_read_only_slot_is_not_written(vcpu):
    machine = vcpu.machine
    hva = machine.ram.guest.address + DATA
    machine.vm.set_user_memory_region(1, DEVICE, 4096, hva, uapi.KVM_MEM_READONLY)
    assert kvm_vcpu_read_guest_page(vcpu, DEVICE, 1) == b"\0"
    assert not kvm_vcpu_write_guest_page(vcpu, DEVICE, b"x")


def test_a_walk_gives_an_address_or_the_guest_s_fault(vcpu):
    machine = vcpu.machine
    assert kvm_mmu_gva_to_gpa(vcpu, DATA + 3, AccessKind.READ) == DATA + 3
    machine.change_entry(DATA)
    assert kvm_mmu_gva_to_gpa(vcpu, DATA + 3, AccessKind.WRITE) == GuestException(14, 6, DATA + 3)
    assert kvm_mmu_gva_to_gpa(vcpu, 1 << 62, AccessKind.READ) == GuestException(13, 0)
    assert kvm_mmu_gva_to_gpa(vcpu, DATA, AccessKind.READ, system=True) == GuestException(
        14, 0, DATA
    )


def test_an_absent_table_is_a_fault_of_the_guest_s_and_not_annotated(soft):
    machine = soft(dialect=replace(DIALECTS["v5"], guards=()))
    vcpu = machine.vcpu.arch
    vcpu.load_sregs()
    machine.ram.guest.protect(machine.TABLES, 4096, PROT_NONE)
    found = kvm_mmu_gva_to_gpa(vcpu, DATA, AccessKind.READ)
    assert found == GuestException(14, 4, DATA)
    assert not machine.vcpu.kvm_run.flags & KVM_RUN_MEMORY_FAULT_FILLED


# -- annotations -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(DIALECTS))
def test_an_ignored_failure_leaves_the_exit_right(soft, name):
    """OUTS from an absent page, in every dialect: it ends in KVM_EXIT_MMIO, and in that only."""
    machine = opted_in(soft("6e" + END, dialect=name, rsi=DATA + 3, rdx=0x90))
    machine.write(DATA + 3, b"x")
    machine.ram.guest.protect(DATA, 4096, PROT_NONE)
    machine.poison_union()
    assert machine.run() == RamMmio(DATA + 3, b"", 1, False)
    machine.vcpu.kvm_run.mmio.data[0] = ord("x")
    assert machine.trace() == [("out", 0x90, b"x")]


def test_v5_tells_of_it_beside_the_exit(soft):
    machine = soft("6e" + END, dialect="v5", rsi=DATA + 3, rdx=0x90)
    machine.ram.guest.protect(DATA, 4096, PROT_NONE)
    assert isinstance(machine.run(), RamMmio)
    run = machine.vcpu.kvm_run
    assert run.flags & KVM_RUN_MEMORY_FAULT_FILLED
    fault = run.speculative_exit.memory_fault
    assert (fault.flags, fault.gpa, fault.len) == (1, DATA + 3, 1)
    assert isinstance(machine.run(), Io)
    assert not run.flags & KVM_RUN_MEMORY_FAULT_FILLED  # it lasts for one KVM_RUN


@pytest.mark.parametrize("name", ANNOTATING)
def test_a_device_is_not_annotated_the_slots_have_been_asked_already(soft, name):
    """vcpu_is_mmio_gpa(): the fault has found that no slot is there."""
    machine = opted_in(soft("8b07 8907" + END, dialect=name, rdi=DEVICE))
    filled = []
    helper = machine.vm.kvm.dialect
    assert Site.VCPU_READ_GUEST_PAGE in helper.annotated
    for _ in range(2):
        assert isinstance(machine.run(), Mmio)
        filled.append(machine.vcpu.kvm_run.flags & KVM_RUN_MEMORY_FAULT_FILLED)
    assert filled == [0, 0]
    assert not machine.vm.kvm.warned


def test_a_write_to_a_read_only_slot_is(soft):
    """There the write is tried, and fails."""
    machine = soft("8907" + END, dialect="v5", rdi=DEVICE)
    hva = machine.ram.guest.address + DATA
    machine.vm.set_user_memory_region(1, DEVICE, 4096, hva, uapi.KVM_MEM_READONLY)
    assert isinstance(machine.run(), Mmio)
    assert machine.vcpu.kvm_run.flags & KVM_RUN_MEMORY_FAULT_FILLED
    assert machine.vcpu.kvm_run.speculative_exit.memory_fault.flags == 2


@pytest.mark.parametrize("name", ["v3", "v4"])
def test_a_second_failure_meets_the_first_one_s_exit(soft, name):
    """PUSHA on an absent stack: the guard sees KVM_EXIT_MMIO and complains, rightly or not."""
    machine = opted_in(soft("60" + END, "real", dialect=name, rsp=0xF100))
    _emulate(machine, machine.STACK)
    with pytest.warns(UserWarning, match="has exit 6 prepared"):
        assert isinstance(machine.run(), RamMmio)


def _emulate(machine, gpa):
    """Writes to the page are KVM's, and fail."""
    kvm, mm = machine.vm.kvm, machine.vm.kvm.mm
    with kvm.second_stage.mmu_lock:
        kvm_slot_page_track_add_page(kvm, kvm.memslots.slots[0], gpa >> 12)
    page = machine.ram.guest.address + gpa

    class NoCopy:
        def copy_to_user(self, hva, data):
            return hva & -4096 != page and mm.copy_to_user(hva, data)

        def __getattr__(self, name):
            return getattr(mm, name)

    kvm.mm = NoCopy()


@pytest.mark.parametrize("name", SILENT)
def test_the_others_say_nothing(soft, name):
    machine = soft(dialect=name)
    vcpu = machine.vcpu.arch
    machine.poison_union()
    vcpu.run.exit_reason = 77
    vcpu_load(vcpu)
    try:
        assert kvm_vcpu_read_guest_page(vcpu, DEVICE, 4) is None
    finally:
        vcpu_put()
    assert vcpu.run.exit_reason == 77
    assert machine.union() == b"\xa5" * 256


@pytest.mark.parametrize("name", ["v3", "v4"])
def test_what_they_leave_in_kvm_run(soft, name):
    machine = opted_in(soft(dialect=name))
    vcpu = machine.vcpu.arch
    vcpu.run.exit_reason = uapi.KVM_EXIT_UNKNOWN
    vcpu_load(vcpu)
    try:
        assert not kvm_vcpu_write_guest_page(vcpu, DEVICE + 8, b"abcd")
    finally:
        vcpu_put()
    fault = vcpu.run.memory_fault
    assert vcpu.run.exit_reason == machine.vm.kvm.dialect.interface.exit_reason
    assert (fault.gpa, fault.size) == (DEVICE + 8, 4)
    assert fault.flags == machine.vm.kvm.dialect.flag_write
    assert machine.vm.kvm.dialect.fill_errno == errno.EFAULT
