"""Faults in private memory, on a modelled host memory and with real guest_memfds."""

from __future__ import annotations

import errno
import os

import pytest
from tests.softkvm.modelled_mm import HVA, NPAGES, READ, WRITABLE, WRITE, At

from guestfault.dialect.interface import EHWPOISON
from guestfault.dialect.published import LINUX_6_8, LINUX_7_3
from guestfault.softkvm.mmu_internal import RetPf
from guestfault.softkvm.preempt import scheduled_by
from guestfault.softkvm.refusal import Exit
from guestfault.softkvm.second_stage import PT_READ, SPTE_MMIO, SPTE_PRIVATE
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import PFERR_PRESENT_MASK, PFERR_PRIVATE_ACCESS, PFERR_RSVD_MASK

PAGE = 4096
SIZE = NPAGES * PAGE
PRIVATE, FLAG = uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE, uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE
PROTECTED = uapi.KVM_X86_SW_PROTECTED_VM
MMIO_FAULT = PFERR_PRESENT_MASK | PFERR_RSVD_MASK
BOTH = pytest.mark.parametrize("dialect", [LINUX_6_8, LINUX_7_3], ids=["linux-6.8", "linux-7.3"])


class Private:
    """A fault path in a protected VM, its slot bound to a guest_memfd ``fd``."""

    def __init__(self, make, dialect) -> None:
        self.one = one = make(dialect, vm_type=PROTECTED)
        self.vm, self.kvm, self.sptes = one.vm, one.kvm, one.stage.sptes
        self.vcpu, self.mm = one.vcpu, one.mm
        self.fd = -1

    def bind(self) -> Private:
        self.fd = self.vm.create_guest_memfd(SIZE)
        self.vm.set_user_memory_region(0, 0, 0, 0)
        self.vm.set_user_memory_region2(0, 0, SIZE, HVA, uapi.KVM_MEM_GUEST_MEMFD, self.fd)
        return self

    def bind_at(self, gfn: int, fd: int) -> None:
        """Another slot, of one page."""
        where = gfn * PAGE, PAGE, HVA + gfn * PAGE
        self.vm.set_user_memory_region2(1, *where, uapi.KVM_MEM_GUEST_MEMFD, guest_memfd=fd)

    def set(self, gfn: int, attributes: int = PRIVATE) -> None:
        self.vm.set_memory_attributes(gfn * PAGE, PAGE, attributes)

    def violation(self, gfn: int, code: int = READ) -> int:
        """1 if the guest goes on, or what KVM_RUN returns; -1000 for any other refusal."""
        self.vcpu.run.exit_reason = 0
        self.vcpu.run.memory_fault.flags = 0xDEAD
        if self.one.violation(gfn, code):
            return 1
        refusal = self.vcpu.refusal
        return refusal.result if isinstance(refusal, Exit) else -1000

    @property
    def told(self) -> tuple[int, int, int] | None:
        """(flags, gfn, size) of the exit."""
        fault = self.vcpu.run.memory_fault
        if self.vcpu.run.exit_reason != uapi.KVM_EXIT_MEMORY_FAULT:
            return None
        return int(fault.flags), int(fault.gpa) // PAGE, int(fault.size)


@pytest.fixture
def private(make):
    made: list[Private] = []

    def build(dialect) -> Private:
        made.append(Private(make, dialect))
        return made[-1]

    yield build
    for one in made:
        if one.fd >= 0:
            os.close(one.fd)


@BOTH
@pytest.mark.parametrize("code", [READ, WRITE])
def test_each_kind_of_access_comes_to_its_own_memory(private, dialect, code):
    one = private(dialect).bind()
    one.set(2)
    file = one.kvm.memslots.by_id(0).gmem.address
    assert one.violation(2, code) == one.violation(3, code) == 1
    assert one.sptes[2] == file + 2 * PAGE | WRITABLE | SPTE_PRIVATE
    assert one.sptes[3] & (-PAGE | SPTE_PRIVATE) == HVA + 3 * PAGE
    one.set(2, 0)
    assert 2 not in one.sptes
    assert one.violation(2, code) == 1
    assert one.sptes[2] & (-PAGE | SPTE_PRIVATE) == HVA + 2 * PAGE


@BOTH
def test_private_memory_that_cannot_be_had(private, dialect):
    one = private(dialect)
    one.set(2)
    assert one.violation(2) == -errno.EFAULT
    assert one.told == (FLAG, 2, PAGE), "the slot has no file"
    one.bind()
    assert one.violation(2) == 1
    one.mm.failing[one.kvm.memslots.by_id(0).gmem.address + 5 * PAGE] = EHWPOISON
    one.set(5)
    assert one.violation(5, WRITE) == -EHWPOISON
    assert one.told == (FLAG, 5, PAGE)
    os.close(one.fd)
    one.fd = -1
    one.set(6)
    assert one.violation(6) == -errno.EFAULT
    assert one.told == (FLAG, 6, PAGE)
    assert 2 not in one.sptes, "what was mapped of it is zapped"
    assert one.violation(7) == 1, "shared memory is there as before"


@BOTH
def test_where_no_slot_is_a_private_access_is_no_mmio(private, dialect):
    one = private(dialect)
    one.set(NPAGES)
    assert one.violation(NPAGES) == -errno.EFAULT
    assert one.told == (FLAG, NPAGES, PAGE)
    assert NPAGES not in one.sptes
    one.set(NPAGES, 0)
    assert one.violation(NPAGES) == -1000
    assert one.told is None
    assert one.sptes[NPAGES] & SPTE_MMIO


@BOTH
def test_an_ordinary_failure_of_shared_memory_is_bare(private, dialect):
    one = private(dialect).bind()
    one.mm.failing[HVA + PAGE] = errno.EFAULT
    assert one.violation(1) == -errno.EFAULT
    assert one.told is None


# -- conversions under way -------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("then", [PRIVATE, 0], ids=["to-private", "to-shared"])
def test_the_mismatch_tells_the_older_attribute(private, dialect, then):
    """Invariant: what is compared with the attribute is the attribute, as it was a moment ago."""
    one = private(dialect).bind()
    one.set(2, then ^ PRIVATE)
    between = "direct_page_fault: read mmu_invalidate_seq"
    with scheduled_by(At(**{between: lambda: one.set(2, then)})):
        assert one.violation(2) == -errno.EFAULT
    assert one.told == (then ^ PRIVATE, 2, PAGE)
    assert 2 not in one.sptes
    assert one.violation(2) == 1, "and the next access is right"
    assert bool(one.sptes[2] & SPTE_PRIVATE) is bool(then)


@BOTH
@pytest.mark.parametrize("then", [PRIVATE, 0], ids=["to-private", "to-shared"])
def test_a_conversion_after_the_comparison_makes_the_fault_look_again(private, dialect, then):
    """Invariant: no entry is installed that is of the memory the frame is not in."""
    one = private(dialect).bind()
    one.set(2, then ^ PRIVATE)
    with scheduled_by(At(**{"direct_page_fault: take mmu_lock": lambda: one.set(2, then)})):
        assert one.one.fault(2, PFERR_PRIVATE_ACCESS * (not then)) == RetPf.RETRY
    assert 2 not in one.sptes


@BOTH
def test_a_fault_in_the_midst_of_a_conversion_is_made_again(private, dialect):
    one = private(dialect).bind()
    results: list[int] = []

    def access() -> None:
        results.append(one.one.fault(2))
        results.append(one.one.fault(3))

    with scheduled_by(At(**{"kvm_vm_set_mem_attributes: store them": access})):
        one.set(2)
    assert results == [RetPf.RETRY, RetPf.FIXED]
    assert 2 not in one.sptes


# -- what the dialects differ in -------------------------------------------------------------------


@pytest.mark.parametrize(("dialect", "told"), [(LINUX_6_8, None), (LINUX_7_3, (0, 2, PAGE))])
def test_a_prefetch_of_what_was_converted_meanwhile(private, dialect, told):
    """Since the original error code is kept, KVM's own fault can be a mismatch; nobody leaves."""
    one = private(dialect).bind()
    one.set(2)
    one.vcpu.run.exit_reason = uapi.KVM_EXIT_UNKNOWN
    r = one.one.fault(2, READ, prefetch=True)
    assert r == (-errno.EFAULT if told else RetPf.FIXED)
    assert one.told == told


def test_a_private_access_that_would_be_emulated(private, monkeypatch):
    for dialect in (LINUX_6_8, LINUX_7_3):
        one = private(dialect).bind()
        one.set(2)
        monkeypatch.setattr("guestfault.softkvm.mmu.page_fault_handle_page_track", lambda *_: True)
        code = PFERR_PRESENT_MASK | WRITE | PFERR_PRIVATE_ACCESS
        r = one.one.fault(2, code)
        if dialect is LINUX_6_8:
            assert r == RetPf.EMULATE
        else:
            assert r == -errno.EFAULT
            assert one.told == (FLAG, 2, PAGE)
        monkeypatch.undo()


@pytest.mark.parametrize("dialect", [LINUX_6_8, LINUX_7_3], ids=["linux-6.8", "linux-7.3"])
def test_an_mmio_entry_that_private_memory_has_replaced(private, dialect):
    """7.3 leaves a fault on an MMIO entry shared; nothing takes the entry away, and so it loops."""
    one = private(dialect)
    assert one.violation(NPAGES) == -1000
    assert one.sptes[NPAGES] & SPTE_MMIO
    one.set(NPAGES)
    fd = one.vm.create_guest_memfd(PAGE)
    one.bind_at(NPAGES, fd)
    if dialect is LINUX_6_8:
        assert one.violation(NPAGES, MMIO_FAULT) == 1
        assert one.sptes[NPAGES] & (PT_READ | SPTE_PRIVATE) == PT_READ | SPTE_PRIVATE
    else:
        for _ in range(3):
            assert one.violation(NPAGES, MMIO_FAULT) == -errno.EFAULT
            assert one.told == (0, NPAGES, PAGE), "shared is what it is not"
            one.vm.set_user_memory_region(1, 0, 0, 0)
            one.bind_at(NPAGES, fd)
    os.close(fd)
