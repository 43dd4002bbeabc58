"""Getting shadow pages, filling them, and taking them back."""

import errno
import struct

import pytest
from tests.softkvm.modelled_mm import HVA, ModelMm, at

from guestfault.dialect.published import LINUX_6_8
from guestfault.softkvm import shadow
from guestfault.softkvm.emulated_access import emulator_write_phys
from guestfault.softkvm.guest_mmu import tlb_fill
from guestfault.softkvm.kvm_host import Request, vcpu_load, vcpu_put
from guestfault.softkvm.page_track import kvm_slot_page_track_is_active
from guestfault.softkvm.processor import Access
from guestfault.softkvm.refusal import Retry
from guestfault.softkvm.shadow_page import KvmMmuPage, Role
from guestfault.softkvm.vm import SoftVm
from guestfault.uapi import kvm as uapi
from guestfault.x86.entries import PT_WRITABLE_MASK

DATA, LAST_TABLE, PAGE_DIRECTORY = 0x4_0000, 0x1_3000, 0x1_2000
TABLES = (0x10, 0x11, 0x12, 0x13)


@pytest.fixture
def machine(soft):
    machine = soft(tdp_enabled=False, dialect="linux-6.8")
    vcpu_load(machine.vcpu.arch)
    yield machine
    vcpu_put()


def miss(machine, gva, access=Access.READ):
    """A TLB miss, until it is not to be tried again: (page, rights), or the refusal."""
    vcpu = machine.vcpu.arch
    if vcpu.sregs_changed:
        vcpu.load_sregs()
    for _ in range(5):
        found = tlb_fill(vcpu, gva, access)
        vcpu.requests.clear()
        if found is not None:
            return found
        if not isinstance(vcpu.refusal, Retry):
            return vcpu.refusal
    raise AssertionError("it retries for ever")


def table_of(machine):
    return machine.vm.kvm.second_stage.shadow


def tracked(machine, gfn):
    return kvm_slot_page_track_is_active(machine.vm.kvm.memslots.gfn_to_memslot(gfn), gfn)


# -- pages and tracking ----------------------------------------------------------------------------


def test_every_table_on_the_way_has_a_page_and_is_tracked(machine):
    assert not any(tracked(machine, gfn) for gfn in TABLES)
    assert miss(machine, DATA) == (DATA, 7)
    assert [(sp.gfn, sp.role.level) for sp in table_of(machine).active] == list(
        zip(TABLES, (4, 3, 2, 1), strict=True)
    )
    assert all(tracked(machine, gfn) for gfn in TABLES)
    assert miss(machine, DATA + 0x1000) == (DATA + 0x1000, 7)
    assert len(table_of(machine).active) == 4


def test_a_frame_that_becomes_a_table_loses_its_right_to_be_written(machine):
    vcpu = machine.vcpu.arch
    new = 0x3_0000
    assert miss(machine, new, Access.WRITE) == (new, 7)
    machine.write(PAGE_DIRECTORY + 8 * 3, struct.pack("<Q", new | 7))
    machine.write(new, struct.pack("<Q", DATA | 0x67))
    found = tlb_fill(vcpu, 3 << 21, Access.READ)
    assert Request.TLB_FLUSH in vcpu.requests  # which is served before the answer is used
    vcpu.requests.clear()
    assert found == (DATA, 7)
    assert not vcpu.mmu.look_up(new)[0] & PT_WRITABLE_MASK
    assert miss(machine, new) == (new, 5)


def test_zapping_ends_the_tracking_and_the_roots(machine):
    miss(machine, DATA)
    kvm = machine.vm.kvm
    roots = machine.vcpu.arch.mmu.roots
    shadow.kvm_mmu_zap_all_fast(kvm)
    assert not table_of(machine).active
    assert not any(tracked(machine, gfn) for gfn in TABLES)
    assert roots[0].invalid
    assert machine.vcpu.arch.mmu.is_obsolete()
    assert Request.TLB_FLUSH in machine.vcpu.arch.requests
    assert miss(machine, DATA) == (DATA, 7)


def test_a_slot_that_goes_takes_all_pages_and_one_that_comes_none(machine):
    miss(machine, DATA)
    address = machine.ram.guest.address
    machine.vm.set_user_memory_region(1, 0x100_0000, 0x1000, address)
    assert len(table_of(machine).active) == 4
    machine.vm.set_user_memory_region(1, 0x100_0000, 0, address)
    assert not table_of(machine).active
    assert miss(machine, DATA) == (DATA, 7)


def test_two_vcpus_share_pages(machine):
    other = machine.add_vcpu(1).arch
    miss(machine, DATA)
    other.load_sregs()
    vcpu_load(other)
    assert tlb_fill(other, DATA, Access.READ) == (DATA, 7)
    assert len(table_of(machine).active) == 4
    assert next(iter(table_of(machine).active)).root_count == 2


# -- what the host and the dirty log take back -----------------------------------------------------


def test_an_invalidation_reaches_the_shadow_pages(machine):
    for gva in (DATA, DATA + 0x1000):
        miss(machine, gva)
    vcpu = machine.vcpu.arch
    machine.discard(DATA)
    assert (vcpu.mmu.look_up(DATA)[0], vcpu.mmu.look_up(DATA + 0x1000)[1]) == (0, 0x41)
    assert Request.TLB_FLUSH in vcpu.requests
    assert miss(machine, DATA) == (DATA, 7)


def test_the_dirty_log(machine):
    address, size = machine.ram.guest.address, machine.RAM_SIZE
    miss(machine, DATA, Access.WRITE)
    machine.vm.set_user_memory_region(0, 0, size, address, uapi.KVM_MEM_LOG_DIRTY_PAGES)
    assert miss(machine, DATA) == (DATA, 5)
    assert not any(machine.vm.get_dirty_log(0))
    assert miss(machine, DATA, Access.WRITE) == (DATA, 7)
    log = machine.vm.get_dirty_log(0)
    assert [gfn for gfn in range(512) if log[gfn // 8] >> gfn % 8 & 1] == [DATA >> 12]
    assert miss(machine, DATA) == (DATA, 5)


def test_flags_that_kvm_sets_in_a_table_are_logged(soft):
    machine = soft(tdp_enabled=False, accessed=False, flags=uapi.KVM_MEM_LOG_DIRTY_PAGES)
    miss(machine, DATA)
    log = machine.vm.get_dirty_log(0)
    assert [gfn for gfn in range(512) if log[gfn // 8] >> gfn % 8 & 1] == list(TABLES)


# -- devices ---------------------------------------------------------------------------------------


def test_a_device_has_an_entry_that_spares_the_walk(machine):
    vcpu = machine.vcpu.arch
    for _ in range(3):
        assert miss(machine, machine.DEVICE + 8).gpa == machine.DEVICE + 8
        vcpu.mmio = None
    assert (vcpu.stat.pf_mmio_spte_created, vcpu.stat.pf_taken) == (1, 1)
    machine.change_entry(machine.DEVICE)
    emulator_write_phys(vcpu, machine.entry_at(machine.DEVICE), bytes(8))
    assert miss(machine, machine.DEVICE).vector == 14


def test_a_device_that_becomes_memory(machine):
    assert miss(machine, machine.DEVICE).gpa == machine.DEVICE
    machine.vm.set_user_memory_region(1, machine.DEVICE, 0x1000, machine.ram.guest.address)
    assert miss(machine, machine.DEVICE) == (machine.DEVICE, 7)


def test_rights_count_for_devices_too(machine):
    machine.change_entry(machine.DEVICE, clear=2)
    assert miss(machine, machine.DEVICE).gpa == machine.DEVICE
    found = miss(machine, machine.DEVICE, Access.WRITE)
    assert (found.vector, found.error_code) == (14, 7)


# -- writes to tables ------------------------------------------------------------------------------


def test_a_write_drops_its_entry_and_no_other(machine):
    vcpu = machine.vcpu.arch
    for gva in (DATA, DATA + 0x1000):
        miss(machine, gva)
    assert emulator_write_phys(vcpu, machine.entry_at(DATA), struct.pack("<Q", 0x5_0007))
    assert vcpu.mmu.look_up(DATA)[0] == 0
    assert vcpu.mmu.look_up(DATA + 0x1000)[1] == 0x41
    assert Request.TLB_FLUSH in vcpu.requests
    assert miss(machine, DATA)[0] == 0x5_0000


def test_a_write_to_what_is_no_table_does_nothing(machine):
    miss(machine, DATA)
    machine.vcpu.arch.requests.clear()
    assert emulator_write_phys(machine.vcpu.arch, DATA, bytes(8))
    assert len(table_of(machine).active) == 4
    assert not machine.vcpu.arch.requests


@pytest.mark.parametrize(
    ("offset", "size", "zapped"),
    [(0, 8, False), (4, 4, False), (0, 1, False), (3, 1, True), (4, 8, True), (2, 2, True)],
)
def test_an_odd_write_is_hardly_one_to_a_page_table(machine, offset, size, zapped):
    miss(machine, DATA)
    at_ = LAST_TABLE + 8 * 100 + offset
    assert emulator_write_phys(machine.vcpu.arch, at_, bytes(size))
    assert tracked(machine, LAST_TABLE >> 12) is not zapped


def test_a_flood_of_writes_and_no_use(machine):
    vcpu = machine.vcpu.arch
    miss(machine, DATA)
    for _ in range(2):
        emulator_write_phys(vcpu, PAGE_DIRECTORY + 8 * 100, bytes(8))
    miss(machine, DATA + 0x1000)  # goes through it, so it is a table after all
    for left in (True, True, False):
        emulator_write_phys(vcpu, PAGE_DIRECTORY + 8 * 100, bytes(8))
        assert tracked(machine, PAGE_DIRECTORY >> 12) is left
    for _ in range(5):  # tables of the last level are not counted
        emulator_write_phys(vcpu, LAST_TABLE + 8 * 100, bytes(8))
    assert tracked(machine, LAST_TABLE >> 12)


@pytest.mark.parametrize(
    ("level", "quadrant", "index", "entries"),
    [
        (1, 0, 5, [5]),
        (1, 1, 5, []),
        (1, 1, 512 + 5, [5]),
        (2, 0, 5, [10, 11]),
        (2, 3, 1023, [510, 511]),
        (2, 1, 255, []),
        (2, 1, 256, [0, 1]),
    ],
)
def test_entries_of_32_bit_tables(level, quadrant, index, entries):
    sp = KvmMmuPage(1, Role(level, has_4_byte_gpte=True, quadrant=quadrant))
    assert list(shadow._get_written_sptes(sp, 0x1000 + 4 * index)) == entries


def test_a_table_can_be_made_memory_again(machine):
    miss(machine, DATA)
    assert shadow.kvm_mmu_unprotect_page(machine.vm.kvm, LAST_TABLE >> 12)
    assert not tracked(machine, LAST_TABLE >> 12)
    assert not shadow.kvm_mmu_unprotect_page(machine.vm.kvm, DATA >> 12)


# -- how many pages --------------------------------------------------------------------------------


@pytest.fixture
def large():
    """A VM of 256 MiB that do not exist, its vCPU without paging."""
    vm = SoftVm(LINUX_6_8, ModelMm(), tdp_enabled=False)
    vm.set_user_memory_region(0, 0, 256 << 20, HVA)
    vcpu = vm.create_vcpu(0).arch
    vcpu_load(vcpu)
    vcpu.load_sregs()
    yield vm, vcpu
    vcpu_put()
    vm.close()


def test_the_bound_on_shadow_pages(large):
    """The oldest go first; a root in use stays."""
    vm, vcpu = large
    table = vm.kvm.second_stage.shadow
    assert shadow.kvm_mmu_max_pages(vm.kvm) == 65536 * 20 // 1000
    shadow.kvm_mmu_change_mmu_pages(vm.kvm, 10)
    assert shadow.kvm_mmu_max_pages(vm.kvm) == 64
    for i in range(128):
        while tlb_fill(vcpu, i << 21, Access.READ) is None:
            assert isinstance(vcpu.refusal, Retry)
            vcpu.requests.clear()
        assert len(table.active) <= 64
    roots = set(vcpu.mmu.roots)
    assert roots <= set(table.active)
    assert not any(sp.invalid for sp in roots)
    assert vcpu.mmu.look_up(0)[0] == 0
    assert vcpu.mmu.look_up(127 << 21)[1] == 127 << 9


def test_the_bound_can_be_set_lower(large):
    vm, vcpu = large
    for i in range(100):
        tlb_fill(vcpu, i << 21, Access.READ)
    table = vm.kvm.second_stage.shadow
    assert len(table.active) > 64
    shadow.kvm_mmu_change_mmu_pages(vm.kvm, 64)
    assert len(table.active) == 64
    assert Request.TLB_FLUSH in vcpu.requests


def test_where_every_page_is_a_root_there_is_no_more_room(large):
    vm, vcpu = large
    vm.kvm.second_stage.shadow.n_max_mmu_pages = 4
    assert tlb_fill(vcpu, 0, Access.READ) is None
    assert vcpu.refusal.result == -errno.ENOSPC


# -- threads ---------------------------------------------------------------------------------------


def test_a_vcpu_that_flushes_for_a_table_holds_the_others_off(machine):
    """While TLBs are flushed the guest may still write to the table unnoticed."""
    other = machine.add_vcpu(1).arch
    other.load_sregs()
    found = []

    def meanwhile():
        vcpu_load(other)
        found.append((tlb_fill(other, DATA, Access.READ), other.refusal))
        vcpu_load(machine.vcpu.arch)

    with at("kvm_flush_remote_tlbs: take mmu_lock", meanwhile):
        assert miss(machine, DATA) == (DATA, 7)
    [(answer, refusal)] = found
    assert answer is None
    assert isinstance(refusal, Retry)
    other.requests.clear()
    vcpu_load(other)
    assert tlb_fill(other, DATA, Access.READ) == (DATA, 7)


@pytest.mark.timeout(60)
@pytest.mark.parametrize("tdp_enabled", [True, False], ids=["npt", "shadow"])
def test_a_changed_entry_is_seen_after_invlpg(soft, background, tdp_enabled):
    """After INVLPG a vCPU never reads by what its entry was before, whatever another vCPU does.

    The other one faults on the same tables all the time, and so makes entries of what it has read.
    """
    # loop: [rsi] = rcx; invlpg; [rdi] == r8?; [rsi] = rdx; invlpg; [rdi] == r9?
    code = "48890e 0f013f 4c3907 7512 488916 0f013f 4c390f 7507 48ffcb 75e5 e6f4 e6f5"
    machine = soft(code, "long-cpl0", tdp_enabled=tdp_enabled)
    pages = DATA + 0x1000, DATA + 0x2000
    for page, word in zip(pages, (0xAAAA, 0xBBBB), strict=True):
        machine.write(page, struct.pack("<Q", word))
    regs = machine.regs
    regs.rdi, regs.rsi, regs.rbx = DATA, machine.entry_at(DATA), 300
    regs.rcx, regs.rdx = (page | 0x63 for page in pages)
    regs.r8, regs.r9 = 0xAAAA, 0xBBBB
    machine.vcpu.set_regs(regs)
    machine.write(0x9000, bytes.fromhex("0f013f 488b07 ebf8"))
    other = machine.add_vcpu(1, rip=0x9000, rdi=DATA)
    runs = background(other.run)
    try:
        assert machine.trace() == []  # and not port 0xf5
    finally:
        other.kick()
        runs.result()


def test_a_slot_that_is_going_gets_no_new_pages(machine):
    """Its counts of tracked frames go with it: a page would outlive them."""
    kvm = machine.vm.kvm
    found = []

    def meanwhile():
        found.append(shadow.kvm_mmu_get_shadow_page(machine.vcpu.arch, 0x20, Role(1)))

    with at("zap_memslot: take mmu_lock", meanwhile):
        machine.vm.set_user_memory_region(0, 0, 0, machine.ram.guest.address)
    assert found == [None]
    assert not table_of(machine).active
    assert shadow.kvm_mmu_get_shadow_page(machine.vcpu.arch, 0x20, Role(1)) is None
    assert kvm.memslots.gfn_to_memslot(0) is None
