"""The bitmap in userspace that says which pages may not be touched yet."""

import errno

import pytest
from tests.softkvm.modelled_mm import HVA, WRITE, at

from guestfault.dialect.published import USERFAULT_V3
from guestfault.fault.outcome import BareFault, MemoryFault, outcome
from guestfault.softkvm.guest_access import (
    kvm_vcpu_read_guest_page,
    kvm_vcpu_write_guest_page,
)
from guestfault.softkvm.mmu_internal import RetPf
from guestfault.x86.registers import PFERR_FETCH_MASK

BITMAP, FLAG, EXIT_FLAG = 0x5000_0000, 1 << 3, 1 << 4
PAGES = 80  # two words


@pytest.fixture
def one(make):
    """Pages 1 and 70 are yet to come."""
    one = make(USERFAULT_V3)
    one.slot(npages=0)
    one.slot(FLAG, npages=PAGES, bitmap=BITMAP)
    one.mm.present = one.mm.writable = {HVA + (i << 12) for i in range(PAGES)}
    one.mm.user = {BITMAP: word(1), BITMAP + 8: word(70 - 64)}
    return one


def word(*bits):
    return sum(1 << bit for bit in bits).to_bytes(8, "little")


def result(one, gfn, code=0):
    return outcome(one.fault(gfn, code), one.vcpu.run, USERFAULT_V3.interface)


@pytest.mark.parametrize("gfn", [1, 70])
@pytest.mark.parametrize("code", [0, WRITE, PFERR_FETCH_MASK])
def test_a_set_bit_is_an_annotated_exit(one, gfn, code):
    found = result(one, gfn, code)
    assert isinstance(found, MemoryFault)
    assert (found.gpa, found.size, found.errno) == (gfn << 12, 4096, errno.EFAULT)
    assert found.flags & EXIT_FLAG
    assert one.mm.fast == one.mm.slow == []  # nobody asks for the page


@pytest.mark.parametrize("gfn", [0, 2, 69, 71])
def test_a_clear_bit_is_nothing(one, gfn):
    assert one.fault(gfn) == RetPf.FIXED


def test_a_bitmap_that_cannot_be_read_fails_bare(one):
    """__get_user() of the word fails, and kvm_do_userfault() annotates nothing."""
    del one.mm.user[BITMAP]
    assert result(one, 0) == BareFault(errno.EFAULT)


def test_a_bit_cleared_after_it_was_read_costs_an_exit_and_no_more(one):
    def clear():
        one.mm.user[BITMAP] = word()

    read = one.mm.copy_from_user

    def read_then_clear(hva, size):
        data = read(hva, size)
        clear()
        return data

    one.mm.copy_from_user = read_then_clear
    assert isinstance(result(one, 1), MemoryFault)
    assert one.fault(1) == RetPf.FIXED


def test_a_bit_set_for_a_page_in_use_is_not_seen(one):
    assert one.fault(2) == RetPf.FIXED
    one.mm.user[BITMAP] = word(1, 2)
    assert one.stage.sptes[2]


def test_enabling_zaps_what_is_mapped_and_disabling_does_not(make):
    one = make(USERFAULT_V3)
    one.all_present()
    assert one.fault(1) == RetPf.FIXED
    one.slot(FLAG, bitmap=BITMAP)
    assert one.stage.sptes == {}
    one.mm.user = {BITMAP: word(1)}
    assert one.fault(1) == -errno.EFAULT
    assert one.fault(0) == RetPf.FIXED
    one.slot(0)
    assert 0 in one.stage.sptes
    assert one.fault(1) == RetPf.FIXED


def test_a_fault_that_began_before_the_flag_maps_nothing_after_it(make):
    """No page whose bit is set is mapped once the ioctl has returned."""
    one = make(USERFAULT_V3)
    one.all_present()
    one.mm.user = {BITMAP: word(1)}
    with at("direct_page_fault: take mmu_lock", lambda: one.slot(FLAG, bitmap=BITMAP)):
        assert one.fault(1) == RetPf.RETRY
    assert one.fault(1) == -errno.EFAULT
    assert one.stage.sptes == {}


def test_kvm_s_own_accesses_are_not_caught(one):
    one.mm.user[HVA + 0x1234] = b"ABCD"
    assert kvm_vcpu_read_guest_page(one.vcpu, 0x1234, 4) == b"ABCD"
    assert kvm_vcpu_write_guest_page(one.vcpu, 0x1234, b"x")
