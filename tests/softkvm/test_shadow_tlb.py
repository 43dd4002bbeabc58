"""The processor on shadow pages: what it accesses for itself, and a guest without paging."""

import struct

import pytest

from guestfault.softkvm.guest_mmu import (
    probe_guest_virt,
    read_guest_virt,
    tlb_fill,
    write_guest_virt,
)
from guestfault.softkvm.kvm_host import vcpu_load, vcpu_put
from guestfault.softkvm.page_track import kvm_slot_page_track_is_active
from guestfault.softkvm.processor import Access
from guestfault.softkvm.refusal import AccessFailed, Emulate, GuestException, Retry
from guestfault.x86.access_kind import AccessKind
from guestfault.x86.registers import GP_VECTOR, PF_VECTOR

DATA, LAST_TABLE, STACK = 0x4_0000, 0x1_3000, 0xF000


@pytest.fixture
def begun(soft):
    """``begun(mode)``: a machine on shadow pages, its vCPU loaded and its registers too."""

    def start(mode="long-cpl3", code="e6f4", **options):
        machine = soft(code, mode, "linux-6.8", tdp_enabled=False, **options)
        vcpu_load(machine.vcpu.arch)
        machine.vcpu.arch.load_sregs()
        return machine

    yield start
    vcpu_put()


def served(machine, access):
    """The requests are served, and what came of it, tried again."""
    for _ in range(5):
        machine.vcpu.arch.requests.clear()
        try:
            return access()
        except AccessFailed as failed:
            if not isinstance(failed.refusal, Retry):
                raise
    raise AssertionError("it retries for ever")


def test_reads_and_writes_across_pages(begun):
    machine = begun()
    vcpu = machine.vcpu.arch
    data = bytes(range(200))
    write_guest_virt(vcpu, DATA + 0xFA0, data)
    assert read_guest_virt(vcpu, DATA + 0xFA0, 200) == data
    assert bytes(machine.bytes[DATA + 0xFA0 : DATA + 0xFA0 + 200]) == data
    probe_guest_virt(vcpu, DATA + 0xFFC, 8)


def test_nothing_is_written_if_the_second_page_cannot_be(begun):
    machine = begun()
    machine.change_entry(DATA + 0x1000, clear=2)
    for access in (
        lambda: write_guest_virt(machine.vcpu.arch, DATA + 0xFFC, b"12345678"),
        lambda: probe_guest_virt(machine.vcpu.arch, DATA + 0xFFC, 8),
    ):
        with pytest.raises(AccessFailed) as failed:
            served(machine, access)
        assert failed.value.refusal == GuestException(PF_VECTOR, 7, DATA + 0x1000)
    assert machine.word(DATA + 0xFF8) == 0


def test_an_access_of_the_processor_s_own_is_a_supervisor_s(begun):
    machine = begun()
    vcpu = machine.vcpu.arch
    machine.change_entry(DATA, clear=4)
    with pytest.raises(AccessFailed) as failed:
        read_guest_virt(vcpu, DATA, 8)
    assert failed.value.refusal == GuestException(PF_VECTOR, 5, DATA)
    assert read_guest_virt(vcpu, DATA, 8, implicit=True) == bytes(8)
    vcpu.system_page = DATA
    assert tlb_fill(vcpu, DATA, Access.READ) is not None


def test_an_address_that_is_not_canonical(begun):
    machine = begun()
    assert tlb_fill(machine.vcpu.arch, 1 << 47, Access.READ) is None
    assert machine.vcpu.arch.refusal == GuestException(GP_VECTOR, 0)


def test_a_page_that_the_host_takes_without_telling_is_faulted_in_again(begun):
    machine = begun()
    vcpu, mm = machine.vcpu.arch, machine.vm.kvm.mm
    write_guest_virt(vcpu, DATA, b"here")
    taken = vcpu.stat.pf_taken
    copies = [None, mm.copy_from_user]

    class Once:
        """The first copy fails."""

        def __getattr__(self, name):
            return getattr(mm, name)

        def copy_from_user(self, hva, size):
            copy = copies.pop(0) if len(copies) > 1 else copies[0]
            return copy and copy(hva, size)

    machine.vm.kvm.mm = Once()
    assert read_guest_virt(vcpu, DATA, 4) == b"here"
    assert vcpu.stat.pf_taken == taken + 1
    machine.vm.kvm.mm = mm


def test_an_exception_on_a_stack_in_a_page_table(begun):
    """kvm_mmu_unprotect_page_virt(): there is no instruction to emulate, so it becomes memory."""
    machine = begun()
    vcpu, table, far = machine.vcpu.arch, 0x3_0000, 3 << 21
    machine.write(0x1_2000 + 8 * 3, struct.pack("<Q", table | 7))
    machine.write(table, struct.pack("<Q", DATA | 7))
    served(machine, lambda: read_guest_virt(vcpu, far, 8))
    slot = machine.vm.kvm.memslots.gfn_to_memslot(0)
    assert kvm_slot_page_track_is_active(slot, table >> 12)
    served(machine, lambda: write_guest_virt(vcpu, table + 0xF00, b"a frame."))
    assert bytes(machine.bytes[table + 0xF00 : table + 0xF08]) == b"a frame."
    assert not kvm_slot_page_track_is_active(slot, table >> 12)


def test_a_stack_in_the_table_that_maps_it_cannot_be_had(begun):
    """To write to it is to walk through it, and so to shadow it again."""
    machine = begun()
    with pytest.raises(AccessFailed) as failed:
        served(machine, lambda: write_guest_virt(machine.vcpu.arch, LAST_TABLE + 0xF00, b"no"))
    assert failed.value.refusal == Emulate(LAST_TABLE + 0xF00, AccessKind.WRITE)


def test_a_device_is_no_stack(begun):
    machine = begun()
    with pytest.raises(AccessFailed) as failed:
        served(machine, lambda: write_guest_virt(machine.vcpu.arch, machine.DEVICE + 8, b"no"))
    assert failed.value.refusal == Emulate(machine.DEVICE + 8, AccessKind.WRITE)


def test_translate_is_kvm_s_own_walk_and_makes_no_entry(begun):
    machine = begun(accessed=False)
    assert machine.vcpu.translate(DATA + 5).physical_address == DATA + 5
    assert not machine.vm.kvm.second_stage.shadow.active
    assert not machine.word(machine.TABLES) & 0x20
    assert not machine.vcpu.translate(5 << 30).valid
