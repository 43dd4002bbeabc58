"""Roots: which shadow pages a vCPU runs on, as its control registers say."""

import struct
from dataclasses import asdict

import pytest

from guestfault.fault.outcome import InternalError, Io
from guestfault.softkvm.guest_mmu import tlb_fill
from guestfault.softkvm.kvm_host import vcpu_load, vcpu_put
from guestfault.softkvm.processor import Access
from guestfault.softkvm.shadow_context import kvm_mmu_free_roots, kvm_mmu_invlpg, kvm_mmu_reload
from guestfault.uapi import kvm as uapi
from guestfault.x86.entries import SIZE_2M, PagingMode
from guestfault.x86.registers import CR0_PG, CR0_WP, CR4_SMAP, CR4_SMEP
from guestfault.x86.segments import Segments
from guestfault.x86.tables import Mapping, TableBuilder

END, READ, DATA = "e6f4", "488b07", 0x4_0000


@pytest.fixture
def shadow(soft):
    """``shadow(code, mode, ...)``: a machine on shadow pages, its vCPU loaded by this thread."""

    def start(*args, **options):
        machine = soft(*args, dialect="linux-6.8", tdp_enabled=False, **options)
        vcpu_load(machine.vcpu.arch)
        return machine

    yield start
    vcpu_put()


def miss(machine, gva, access=Access.READ):
    """A TLB miss, by itself: (page, rights), or the refusal."""
    vcpu = machine.vcpu.arch
    if vcpu.sregs_changed:
        vcpu.load_sregs()
    found = tlb_fill(vcpu, gva, access)
    vcpu.requests.clear()
    return vcpu.refusal if found is None else found


def load(machine, **registers):
    """The guest has written its control registers."""
    vcpu = machine.vcpu.arch
    for name, value in registers.items():
        setattr(vcpu.sregs, name, value)
    vcpu.load_sregs()


def pages(machine):
    return list(machine.vm.kvm.second_stage.shadow.active)


def test_roots_are_found_again(shadow):
    """A guest that goes to other tables and comes back finds its shadow pages as they were."""
    machine = shadow(code=END, mode="long-cpl0")
    vcpu = machine.vcpu.arch
    miss(machine, DATA)
    before = pages(machine)
    tables = TableBuilder(PagingMode.FOUR_LEVEL, 0x2_0000)
    tables.map(Mapping(0, 0x1000, SIZE_2M))
    machine.write(0x2_0000, tables.image())
    load(machine, cr3=0x2_0000)
    assert miss(machine, DATA)[0] == DATA + 0x1000
    assert before[0].root_count == 0
    taken = vcpu.stat.pf_taken
    load(machine, cr3=machine.TABLES)
    assert miss(machine, DATA)[0] == DATA
    assert (vcpu.stat.pf_taken, vcpu.mmu.roots) == (taken, (before[0],))
    assert before[0].root_count == 1
    kvm_mmu_free_roots(vcpu)
    kvm_mmu_free_roots(vcpu)
    assert before[0].root_count == 0
    assert kvm_mmu_reload(vcpu) == 0
    assert before[0].root_count == 1


@pytest.mark.parametrize(
    "change",
    [
        {"cr0": ~CR0_WP},
        {"cr0": ~CR0_WP, "cr4": CR4_SMEP},
        {"cr0": ~CR0_WP, "cr4": CR4_SMAP},
        {"efer": ~0x800},
    ],
    ids=["wp", "smep", "smap", "nxe"],
)
def test_the_same_tables_read_otherwise_are_other_pages(shadow, change):
    machine = shadow(code=END, mode="long-cpl0")
    miss(machine, DATA)
    vcpu = machine.vcpu.arch
    first, sregs = vcpu.mmu.roots, vcpu.sregs
    new = {
        name: getattr(sregs, name) & bits if bits < 0 else getattr(sregs, name) | bits
        for name, bits in change.items()
    }
    load(machine, **new)
    miss(machine, DATA)
    assert vcpu.mmu.roots != first
    assert vcpu.mmu.roots[0].gfn == first[0].gfn


def test_other_bits_make_no_difference(shadow):
    machine = shadow(code=END, mode="long-cpl0")
    miss(machine, DATA)
    vcpu = machine.vcpu.arch
    first = vcpu.mmu.roots
    load(machine, cr4=vcpu.sregs.cr4 | CR4_SMEP)  # with WP
    assert miss(machine, DATA)[0] == DATA
    assert vcpu.mmu.roots == first


def test_paging_goes_off_and_comes_back(shadow):
    machine = shadow(code=END, mode="long-cpl0")
    vcpu = machine.vcpu.arch
    miss(machine, DATA)
    cr0, efer = vcpu.sregs.cr0, vcpu.sregs.efer
    load(machine, cr0=cr0 & ~CR0_PG, efer=0)
    assert miss(machine, DATA)[0] == DATA
    assert len(vcpu.mmu.roots) == 4
    assert all(sp.role.direct for sp in vcpu.mmu.roots)
    load(machine, cr0=cr0, efer=efer)
    assert miss(machine, DATA)[0] == DATA
    assert [sp.role.level for sp in vcpu.mmu.roots] == [4]


def test_without_shadow_pages_there_is_nothing_to_load(soft):
    vcpu = soft(tdp_enabled=True).vcpu.arch
    assert kvm_mmu_reload(vcpu) == 0
    kvm_mmu_free_roots(vcpu)
    kvm_mmu_invlpg(vcpu, DATA)


# -- INVLPG ----------------------------------------------------------------------------------------


def test_invlpg_forgets_one_page(shadow):
    machine = shadow(code=END, mode="long-cpl0")
    vcpu = machine.vcpu.arch
    for gva in (DATA, DATA + 0x1000):
        miss(machine, gva)
    kvm_mmu_invlpg(vcpu, DATA + 0x123)
    assert vcpu.mmu.look_up(DATA)[0] == 0
    assert vcpu.mmu.look_up(DATA + 0x1000)[0] != 0
    kvm_mmu_invlpg(vcpu, 5 << 39)  # where nothing is


def test_invlpg_forgets_what_userspace_has_changed(shadow):
    machine = shadow(READ + "ee 0f013f 488b1f" + END, "long-cpl0", rdi=DATA, rdx=0x80)
    machine.write(DATA, b"old page")
    machine.write(DATA + 0x1000, b"new page")
    assert isinstance(machine.run(), Io)
    machine.write(machine.entry_at(DATA), struct.pack("<Q", DATA + 0x1000 | 0x63))
    assert machine.trace() == []
    assert struct.pack("<Q", machine.regs.rbx) == b"new page"


# -- the registers of PAE paging -------------------------------------------------------------------


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


def test_pdptrs_are_read_when_cr3_is_loaded_and_not_before(shadow):
    machine = protected(shadow, PagingMode.PAE, "8b07 0f22d8 8b07" + END, rdi=DATA, rax=0x2_0000)
    assert miss(machine, DATA)[0] == DATA
    machine.write(0x2_0000, bytes(8))  # by userspace
    assert miss(machine, DATA + 0x1000)[0] == DATA + 0x1000
    [(what, why)] = machine.trace()  # MOV to CR3 reads them; the next fetch faults
    assert what == "stop"
    assert isinstance(why, InternalError)
    assert "exception 14" in machine.vcpu.arch.last_error


def test_pdptrs_that_cannot_be_read_are_a_general_protection_fault(shadow):
    machine = protected(shadow, PagingMode.PAE, "0f22d8" + END, rax=0x3000_0000)
    assert isinstance(machine.run(), InternalError)  # 32-bit delivery is not there
    assert "exception 13" in machine.vcpu.arch.last_error
    assert machine.vcpu.get_sregs().cr3 == 0x2_0000
