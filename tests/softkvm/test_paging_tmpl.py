"""Faults under shadow paging: what the guest's tables make of them, and what changes meanwhile."""

import errno
import mmap
import struct
from dataclasses import asdict

import pytest
from tests.softkvm.modelled_mm import at

from guestfault.fault.outcome import BareFault
from guestfault.softkvm.emulated_access import emulator_write_phys
from guestfault.softkvm.guest_mmu import tlb_fill
from guestfault.softkvm.kvm_host import vcpu_load, vcpu_put
from guestfault.softkvm.mmu import kvm_mmu_do_page_fault
from guestfault.softkvm.mmu_internal import KvmPageFault, RetPf
from guestfault.softkvm.paging_tmpl import fetch, walk_addr
from guestfault.softkvm.processor import Access
from guestfault.softkvm.refusal import Emulate, GuestException, Retry
from guestfault.softkvm.shadow import kvm_mmu_change_mmu_pages
from guestfault.uapi import kvm as uapi
from guestfault.uapi.mman import PROT_NONE
from guestfault.x86.access_kind import AccessKind
from guestfault.x86.entries import PT_ACCESSED_MASK, PT_DIRTY_MASK, SIZE_2M, PagingMode
from guestfault.x86.registers import CR0_WP, PF_VECTOR, PFERR_USER_MASK
from guestfault.x86.segments import Segments
from guestfault.x86.tables import Mapping, TableBuilder

END, READ, WRITE = "e6f4", "488b07", "488907"
DATA, HANDLER = 0x4_0000, 0x9000
TABLE = 0x3_0000  # of its own: nothing that the guest needs otherwise goes through it
FAR = 3 << 21  # what it maps
LAST_TABLE = 0x1_3000


@pytest.fixture
def shadow(soft):
    """``shadow(code, mode, ...)``: a machine on shadow pages, its vCPU loaded by this thread."""

    def start(*args, dialect="linux-6.8", **options):
        machine = soft(*args, dialect=dialect, tdp_enabled=False, **options)
        vcpu_load(machine.vcpu.arch)
        return machine

    yield start
    vcpu_put()


def map_far(machine, flags=7):
    """Have FAR mapped by a table of its own."""
    machine.write(0x1_2000 + 8 * (FAR >> 21), struct.pack("<Q", TABLE | 7))
    machine.write(TABLE, struct.pack("<Q", DATA | flags))


def page_fault(machine):
    """The error code of the page fault that the guest gets, and CR2."""
    machine.gate(PF_VECTOR, HANDLER)
    machine.write(HANDLER, bytes.fromhex("58" + END))  # pop rax
    assert machine.trace() == []
    return machine.regs.rax, machine.vcpu.get_sregs().cr2


def miss(machine, gva, access=Access.READ):
    """A TLB miss, by itself: (page, rights), or the refusal."""
    vcpu = machine.vcpu.arch
    if vcpu.sregs_changed:
        vcpu.load_sregs()
    found = tlb_fill(vcpu, gva, access)
    vcpu.requests.clear()
    return vcpu.refusal if found is None else found


# -- tables that KVM cannot read -------------------------------------------------------------------


@pytest.mark.parametrize(("code", "error_code"), [(READ, 4), (WRITE, 6)])
def test_a_table_that_cannot_be_read_is_a_page_fault_of_the_guest_s(shadow, code, error_code):
    """The swallowed -EFAULT: no processor would have raised it, and no exit tells of it."""
    machine = shadow(code + END, rdi=FAR + 8)
    map_far(machine)
    machine.ram.guest.protect(TABLE, 4096, PROT_NONE)
    assert page_fault(machine) == (error_code, FAR + 8)


def test_with_npt_the_same_table_is_a_fault_that_comes_out(soft):
    machine = soft(READ + END, dialect="linux-6.8", rdi=FAR + 8)
    map_far(machine)
    machine.ram.guest.protect(TABLE, 4096, PROT_NONE)
    assert machine.run() == BareFault(errno.EFAULT)
    machine.ram.guest.protect(TABLE, 4096, mmap.PROT_READ | mmap.PROT_WRITE)
    assert machine.trace() == []


def test_a_table_where_no_slot_is(shadow):
    machine = shadow(READ + END, rdi=FAR)
    machine.write(0x1_2000 + 8 * (FAR >> 21), struct.pack("<Q", 0x3000_0007))
    assert page_fault(machine) == (4, FAR)


def test_a_root_where_no_slot_is_shuts_the_guest_down(shadow):
    machine = shadow(sregs=lambda s: setattr(s, "cr3", 0x4000_0000))
    [(what, why)] = machine.trace()
    assert (what, type(why).__name__) == ("stop", "Shutdown")


def test_the_page_itself_is_another_matter(shadow):
    """An absent page is KVM's fault to resolve, at its gpa, whatever its gva."""
    machine = shadow(READ + END, dialect="seed", flags=4, rdi=FAR + 8)
    map_far(machine)
    machine.bring_in(0, machine.RAM_SIZE)
    machine.discard(DATA)
    machine.bring_in(0, DATA)
    found = machine.run()
    assert (found.gpa, found.errno) == (DATA, errno.EFAULT)
    assert machine.vcpu.arch.stat.pf_taken >= 2
    machine.bring_in(DATA)
    assert machine.trace() == []


def test_flags_that_cannot_be_set_are_a_page_fault_too(shadow):
    """update_accessed_dirty_bits(): its -EFAULT does not propagate."""
    machine = shadow(READ + END, rdi=FAR)
    map_far(machine, flags=7)
    machine.ram.guest.protect(TABLE, 4096, mmap.PROT_READ)
    assert page_fault(machine) == (4, FAR)
    assert not machine.word(TABLE) & PT_ACCESSED_MASK


def test_a_prefetch_gives_the_guest_no_page_fault(shadow):
    machine = shadow(rdi=FAR)
    vcpu = machine.vcpu.arch
    miss(machine, machine.CODE, Access.FETCH)
    assert kvm_mmu_do_page_fault(vcpu, FAR, PFERR_USER_MASK, prefetch=True) == RetPf.RETRY
    assert vcpu.mmu.injected is None
    taken = vcpu.stat.pf_taken
    map_far(machine)
    assert kvm_mmu_do_page_fault(vcpu, FAR, PFERR_USER_MASK, prefetch=True) == RetPf.FIXED
    assert kvm_mmu_do_page_fault(vcpu, FAR, PFERR_USER_MASK, prefetch=True) == RetPf.SPURIOUS
    assert vcpu.stat.pf_taken == taken
    assert miss(machine, FAR)[0] == DATA


# -- flags -----------------------------------------------------------------------------------------


def test_flags_are_set_as_the_processor_would(shadow):
    machine = shadow(READ + "48897708" + END, accessed=False, rdi=DATA)
    assert machine.trace() == []
    both = PT_ACCESSED_MASK | PT_DIRTY_MASK
    assert machine.word(machine.entry_at(DATA)) & both == both
    assert machine.word(machine.entry_at(machine.CODE)) & both == PT_ACCESSED_MASK
    assert machine.word(machine.TABLES) & PT_ACCESSED_MASK


def test_tables_in_a_read_only_slot_keep_their_flags(shadow):
    machine = shadow(WRITE + END, accessed=False, rdi=FAR)
    rom = 0x100_0000
    machine.vm.set_user_memory_region(
        1, rom, 4096, machine.ram.guest.address + TABLE, uapi.KVM_MEM_READONLY
    )
    map_far(machine)
    machine.write(0x1_2000 + 8 * (FAR >> 21), struct.pack("<Q", rom | 7))
    assert machine.trace() == []
    assert machine.word(TABLE) == DATA | 7


def test_an_entry_that_changes_before_its_flag_is_set_is_walked_again(shadow):
    machine = shadow(rdi=FAR)
    map_far(machine)
    other = struct.pack("<Q", DATA + 0x1000 | 7)
    with at(
        "FNAME(update_accessed_dirty_bits): exchange",
        lambda: machine.write(0x1_2000 + 8 * (FAR >> 21), struct.pack("<Q", TABLE + 0x1000 | 7)),
    ):
        machine.write(TABLE + 0x1000, other)
        assert miss(machine, FAR)[0] == DATA + 0x1000
    assert not machine.word(TABLE) & PT_ACCESSED_MASK


# -- what changes between the walk and the entry ---------------------------------------------------

LOCK = "FNAME(page_fault): take mmu_lock"


def test_an_entry_that_changes_before_its_table_is_shadowed(shadow):
    """gpte_changed(): the table was not tracked when the walk read it."""
    machine = shadow()
    map_far(machine)
    assert miss(machine, machine.CODE, Access.FETCH)
    with at(LOCK, lambda: machine.write(TABLE, struct.pack("<Q", DATA + 0x1000 | 7))):
        found = miss(machine, FAR)
    while isinstance(found, Retry):
        found = miss(machine, FAR)
    assert found[0] == DATA + 0x1000


def test_a_table_that_another_vcpu_shadows_after_it_was_read(shadow):
    """It has a page by the time of the lock, and had none when it was read and then written."""
    machine = shadow()
    map_far(machine)
    vcpu, other = machine.vcpu.arch, machine.add_vcpu(1).arch
    miss(machine, DATA)

    def meanwhile():
        machine.write(TABLE, struct.pack("<Q", DATA + 0x1000 | 7))
        vcpu_load(other)
        other.load_sregs()
        assert tlb_fill(other, FAR, Access.READ)[0] == DATA + 0x1000
        vcpu_load(vcpu)

    with at(LOCK, meanwhile):
        assert isinstance(miss(machine, FAR), Retry)
    assert miss(machine, FAR)[0] == DATA + 0x1000


@pytest.mark.parametrize("level", [1, 2, 3, 4])
def test_an_entry_that_changes_while_its_table_is_shadowed(shadow, level):
    """At any level: the write is emulated, and drops what the walk was made for."""
    machine = shadow()
    vcpu = machine.vcpu.arch
    miss(machine, DATA)
    gone = {4: 0x1_0000, 3: 0x1_1000, 2: 0x1_2000, 1: machine.entry_at(DATA + 0x1000)}[level]

    def write():
        assert emulator_write_phys(vcpu, gone, bytes(8))
        vcpu.requests.clear()

    with at(LOCK, write):
        assert isinstance(miss(machine, DATA + 0x1000), Retry)
    found = miss(machine, DATA + 0x1000)
    assert found == GuestException(PF_VECTOR, 4 if vcpu.cpl == 3 else 0, DATA + 0x1000)
    if level > 1:  # and nothing is left of what was found by the same way before
        assert isinstance(miss(machine, DATA), GuestException)


def test_a_page_that_the_host_takes_in_the_middle_is_not_installed(shadow):
    machine = shadow()
    miss(machine, DATA)
    page = machine.ram.guest.address + DATA + 0x1000

    def invalidate():
        machine.vm.invalidate_range_start(page, page + 4096)
        machine.vm.invalidate_range_end(page, page + 4096)

    with at(LOCK, invalidate):
        assert isinstance(miss(machine, DATA + 0x1000), Retry)
    assert machine.vcpu.arch.mmu.look_up(DATA + 0x1000)[0] == 0
    assert miss(machine, DATA + 0x1000)[0] == DATA + 0x1000


def test_while_somebody_flushes_for_a_new_table_nobody_trusts_it(shadow):
    machine = shadow()
    miss(machine, DATA)
    table = machine.vm.kvm.second_stage.shadow
    table.flushing += 1
    assert isinstance(miss(machine, DATA + 0x1000), Retry)
    table.flushing -= 1
    assert miss(machine, DATA + 0x1000)[0] == DATA + 0x1000


def test_a_root_that_is_zapped_in_the_middle(shadow):
    machine = shadow()
    vcpu = machine.vcpu.arch
    miss(machine, DATA)
    with at(LOCK, lambda: machine.vm.set_user_memory_region(0, 0, 0, 0)):
        assert isinstance(miss(machine, DATA + 0x1000), Retry)
    assert all(sp.invalid for sp in vcpu.mmu.roots)
    assert isinstance(miss(machine, DATA), GuestException)


def test_a_slot_that_comes_where_the_root_is(shadow):
    """kvm_mmu_is_dummy_root() in FNAME(fetch): load another root."""
    machine = shadow(sregs=lambda s: setattr(s, "cr3", 0x100_0000))
    assert isinstance(miss(machine, DATA), GuestException)
    address = machine.ram.guest.address + machine.TABLES
    machine.vm.set_user_memory_region(1, 0x100_0000, 0x1000, address)
    assert isinstance(miss(machine, DATA), Retry)
    assert miss(machine, DATA)[0] == DATA


def test_no_room_for_shadow_pages(shadow):
    machine = shadow(READ + END, rdi=DATA)
    table = machine.vm.kvm.second_stage.shadow
    table.n_max_mmu_pages = 1
    assert machine.vcpu.run() == -errno.ENOSPC
    kvm_mmu_change_mmu_pages(machine.vm.kvm, 0)
    assert machine.trace() == []


@pytest.mark.parametrize(("dialect", "exit_reason"), [("wip-v2", 38), ("linux-6.8", 0)])
def test_a_level_that_does_not_fit_is_an_error(shadow, dialect, exit_reason):
    """The WARN of FNAME(fetch), which cannot come about: the root is given a level by hand."""
    machine = shadow(dialect=dialect)
    vcpu = machine.vcpu.arch
    machine.vm.kvm.memfault_exit_reasons = 1
    miss(machine, DATA)
    walker = walk_addr(vcpu, DATA, AccessKind.READ, True)
    root = vcpu.mmu.roots[0]
    root.role = root.role._replace(level=0)
    gpa, value, _ = walker.entries[0]
    fault = KvmPageFault(DATA, 0, False, DATA >> 12, False)
    with pytest.warns(UserWarning, match="another level"):
        r = fetch(vcpu, fault, walker._replace(entries=((gpa, value, 0),), pt_access=(7,)), 7)
    assert r < 0
    assert vcpu.run.exit_reason == exit_reason
    if exit_reason:
        assert vcpu.run.memory_fault.gpa == DATA


# -- rights ----------------------------------------------------------------------------------------


def test_a_supervisor_writes_to_a_read_only_page_without_wp(shadow):
    """And a user reads it afterwards, and cannot write to it: the entry is turned to and fro."""
    machine = shadow(sregs=lambda s: setattr(s, "cr0", s.cr0 & ~CR0_WP))
    machine.change_entry(DATA, clear=2)
    vcpu = machine.vcpu.arch
    miss(machine, machine.CODE)
    vcpu.cpl = 0
    assert miss(machine, DATA, Access.WRITE) == (DATA, 7)
    vcpu.cpl = 3
    assert miss(machine, DATA) == (DATA, 5)
    assert miss(machine, DATA, Access.WRITE) == GuestException(PF_VECTOR, 7, DATA)
    vcpu.cpl = 0
    assert miss(machine, DATA, Access.WRITE) == (DATA, 7)


def test_a_write_to_a_table_in_use_is_emulated(shadow):
    machine = shadow()
    table = LAST_TABLE
    assert miss(machine, table, Access.READ) == (table, 5)
    found = miss(machine, table + 8, Access.WRITE)
    assert found == Emulate(table + 8, AccessKind.WRITE)
    found = miss(machine, table + 8, Access.WRITE)  # now its entry is there, and present
    assert found == Emulate(table + 8, AccessKind.WRITE)


def test_a_large_page_of_the_guest_s(shadow):
    machine = shadow(WRITE + END, rdi=FAR + 0x12_3458)
    machine.write(0x1_2000 + 8 * (FAR >> 21), struct.pack("<Q", 0x87))  # 2 MiB, from 0 on
    assert machine.trace() == []
    pages = machine.vm.kvm.second_stage.shadow.active
    assert any(sp.role.direct and sp.role.level == 1 for sp in pages)
    assert machine.word(0x1_2000 + 8 * (FAR >> 21)) & PT_DIRTY_MASK


# -- other modes of paging -------------------------------------------------------------------------


def protected(shadow, mode, code, **regs):
    """A machine in 32-bit protected mode, its tables (identity) at 0x20000."""
    tables = TableBuilder(mode, 0x2_0000)
    tables.map(Mapping(0, 0, SIZE_2M))

    def change(sregs):
        state = tables.state
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = state.cr0, state.cr3, state.cr4, state.efer
        for name, fields in asdict(Segments.protected_mode()).items():
            if name != "tr":
                setattr(sregs, name, uapi.kvm_segment(**fields))

    machine = shadow(code, "long-cpl0", sregs=change, **regs)
    machine.write(0x2_0000, tables.image())
    return machine


@pytest.mark.parametrize("mode", [PagingMode.BITS32, PagingMode.PAE])
def test_protected_mode(shadow, mode):
    machine = protected(shadow, mode, "8b07 8906" + END, rdi=DATA + 4, rsi=DATA + 0x2000)
    machine.write(DATA + 4, b"here")
    assert machine.trace() == []
    assert bytes(machine.bytes[DATA + 0x2000 : DATA + 0x2004]) == b"here"
    pages = machine.vm.kvm.second_stage.shadow.active
    four = mode is PagingMode.BITS32
    assert {sp.role.has_4_byte_gpte for sp in pages} == {four}
    # A guest's table of 1024 entries has two pages, its directory four, one for each GiB.
    assert sum(sp.gfn == 0x20 for sp in pages) == (4 if four else 0)


def test_a_32_bit_table_that_is_written(shadow):
    """Each of its entries has one entry in one of two shadow pages."""
    machine = protected(shadow, PagingMode.BITS32, END)
    vcpu = machine.vcpu.arch
    for gva in (DATA, DATA + 0x1000):
        assert miss(machine, gva)[0] == gva
    table = machine.word(0x2_0000, 4) & 0xFFFF_F000
    entry = table + 4 * (DATA >> 12)
    assert emulator_write_phys(vcpu, entry, struct.pack("<I", DATA + 0x5000 | 0x63))
    assert vcpu.mmu.look_up(DATA)[0] == 0
    assert vcpu.mmu.look_up(DATA + 0x1000)[1] == (DATA >> 12) + 1
    assert miss(machine, DATA)[0] == DATA + 0x5000
    assert emulator_write_phys(vcpu, 0x2_0000, bytes(4))  # 4 MiB: two entries of the directory's
    assert isinstance(miss(machine, DATA), GuestException)
