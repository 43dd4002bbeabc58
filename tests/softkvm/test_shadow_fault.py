"""A guest without paging on shadow pages: they are direct."""

import pytest
from tests.softkvm.modelled_mm import at

from guestfault.softkvm.guest_mmu import tlb_fill
from guestfault.softkvm.kvm_host import vcpu_load, vcpu_put
from guestfault.softkvm.processor import Access
from guestfault.softkvm.refusal import Emulate, Retry
from guestfault.x86.access_kind import AccessKind

DATA, LAST_TABLE = 0x4_0000, 0x1_3000


@pytest.fixture
def begun(soft):
    """``begun(mode)``: a machine on shadow pages, its vCPU loaded and its registers too."""

    def start(mode):
        machine = soft("e6f4", mode, "linux-6.8", tdp_enabled=False)
        vcpu_load(machine.vcpu.arch)
        machine.vcpu.arch.load_sregs()
        return machine

    yield start
    vcpu_put()


def test_without_paging_pages_are_direct(begun):
    machine = begun("real")
    vcpu = machine.vcpu.arch
    assert tlb_fill(vcpu, DATA + 5, Access.WRITE) == (DATA, 7)
    assert tlb_fill(vcpu, 1 << 32 | DATA, Access.READ) == (DATA, 7)  # addresses have 32 bits
    pages = machine.vm.kvm.second_stage.shadow.active
    assert all(sp.role.direct for sp in pages)
    assert sorted((sp.role.level, sp.gfn) for sp in pages) == [
        (1, 0),
        *((2, i << 18) for i in range(4)),
    ]
    assert tlb_fill(vcpu, machine.DEVICE + 8, Access.READ) is None
    assert vcpu.refusal == Emulate(machine.DEVICE + 8, AccessKind.READ)


def test_without_paging_a_page_can_go_in_the_middle(begun):
    machine = begun("real")
    vcpu = machine.vcpu.arch
    page = machine.ram.guest.address + DATA

    def invalidate():
        machine.vm.invalidate_range_start(page, page + 4096)
        machine.vm.invalidate_range_end(page, page + 4096)

    tlb_fill(vcpu, DATA + 0x1000, Access.READ)
    with at("direct_page_fault: take mmu_lock", invalidate):
        assert tlb_fill(vcpu, DATA, Access.READ) is None
    assert isinstance(vcpu.refusal, Retry)
    vcpu.requests.clear()
    assert tlb_fill(vcpu, DATA, Access.READ) == (DATA, 7)


def test_another_vcpu_s_tables_are_written_by_kvm_without_paging_too(begun):
    machine = begun("real")
    machine.mode = "long-cpl0"
    other = machine.add_vcpu(1).arch
    other.load_sregs()
    vcpu_load(other)
    assert tlb_fill(other, DATA, Access.READ) == (DATA, 7)
    vcpu = machine.vcpu.arch
    vcpu_load(vcpu)
    for _ in range(2):  # the second time an entry is there
        vcpu.requests.clear()
        assert tlb_fill(vcpu, LAST_TABLE, Access.WRITE) is None
        assert vcpu.refusal == Emulate(LAST_TABLE, AccessKind.WRITE)
    assert tlb_fill(vcpu, LAST_TABLE, Access.READ) == (LAST_TABLE, 5)
