"""The end of an asynchronous page fault, step by step, on a modelled host memory.

The VM is a :class:`~tests.softkvm.modelled_mm.FaultPath` with an APIC; works are run by hand.
"""

import errno

import pytest

from guestfault.dialect.published import LINUX_7_3, SEED
from guestfault.softkvm import async_pf_ready
from guestfault.softkvm.apf_state import KvmArchAsyncPf, KvmAsyncPf
from guestfault.softkvm.async_pf import (
    kvm_arch_setup_async_pf,
    kvm_async_pf_wakeup_all,
    kvm_can_do_async_pf,
    kvm_clear_async_pf_completion_queue,
    kvm_find_async_pf_gfn,
    kvm_setup_async_pf,
)
from guestfault.softkvm.async_pf_ready import (
    kvm_arch_async_page_ready,
    kvm_check_async_pf_completion,
)
from guestfault.softkvm.kvm_host import Request, kvm_test_request
from guestfault.softkvm.lapic import KvmLapic
from guestfault.softkvm.refusal import GuestException
from guestfault.softkvm.x86 import vcpu_enter_guest
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import CR0_PG, PF_VECTOR, PFERR_WRITE_MASK, X86_EFLAGS_IF

HVA = 0x7000_0000_0000
GFN = 5


@pytest.fixture
def path(make):
    """A VM whose vCPU can be halted, and ``works`` that nobody has done yet."""

    def build(dialect=SEED):
        path = make(dialect)
        path.vcpu.apic = KvmLapic(0)
        path.vcpu.load_sregs()
        path.vcpu.cpu.set("rflags", 2 | X86_EFLAGS_IF)
        path.works = []
        path.kvm.schedule_work = path.works.append
        path.mm.slow_to_come.add(HVA + (GFN << 12))
        return path

    return build


def setup(path, gfn=GFN, error_code=0):
    return kvm_arch_setup_async_pf(path.vcpu, gfn << 12, gfn, HVA + (gfn << 12), error_code)


def test_setup_halts_and_the_work_ends_it(path):
    path = path()
    vcpu = path.vcpu
    assert setup(path)
    assert kvm_find_async_pf_gfn(vcpu, GFN)
    assert vcpu.requests == {Request.APF_HALT}
    path.mm.bring_in(HVA + (GFN << 12))
    path.works.pop()()
    assert path.mm.slow[-1] == (HVA + (GFN << 12), True), "for writing, whatever was wanted"
    assert kvm_test_request(vcpu, Request.APF_READY)
    vcpu.apf.halted = True
    vcpu.mp_state = uapi.KVM_MP_STATE_HALTED
    kvm_check_async_pf_completion(vcpu)
    assert (vcpu.apf.halted, vcpu.mp_state) == (False, uapi.KVM_MP_STATE_RUNNABLE)
    assert GFN in path.stage.sptes
    assert not kvm_find_async_pf_gfn(vcpu, GFN)
    assert (vcpu.async_pf.queued, vcpu.async_pf.queue) == (0, [])


@pytest.mark.parametrize("hva", [-1, 1 << 47, (1 << 64) - errno.EFAULT])
def test_an_address_that_is_none_is_refused(path, hva):
    path = path()
    assert not kvm_setup_async_pf(path.vcpu, 0, hva, KvmArchAsyncPf())
    assert not path.works
    assert not path.vcpu.requests


def test_when_it_cannot_be_done(path):
    vcpu = path().vcpu
    assert kvm_can_do_async_pf(vcpu)
    vcpu.pending_exception = GuestException(PF_VECTOR, 0)
    assert not kvm_can_do_async_pf(vcpu)
    vcpu.pending_exception = None
    vcpu.interrupt_injected = 0x31
    assert not kvm_can_do_async_pf(vcpu)
    vcpu.interrupt_injected = None
    vcpu.emulating = True
    assert not kvm_can_do_async_pf(vcpu)
    vcpu.emulating = False
    vcpu.cpu.set("rflags", 2)
    assert not kvm_can_do_async_pf(vcpu)
    vcpu.cpu.set("rflags", 2 | X86_EFLAGS_IF)
    vcpu.apic = None
    assert not kvm_can_do_async_pf(vcpu)


def test_a_token_is_never_zero_and_says_whose(path):
    path = path()
    path.vcpu.apf.id = (1 << 20) - 1
    for gfn in (1, 2):
        assert setup(path, gfn)
    assert [work.arch.token for work in path.vcpu.async_pf.queue] == [0xFFFFF << 12, 1 << 12]


def test_the_result_of_the_second_fault_is_dropped_and_its_annotation_is_not(path):
    """The seed's question: -EFAULT goes nowhere, kvm_run is filled."""
    path = path()
    vcpu = path.vcpu
    assert setup(path)
    path.mm.failing[HVA + (GFN << 12)] = errno.EFAULT
    path.works.pop()()
    vcpu.run.exit_reason = uapi.KVM_EXIT_UNKNOWN
    assert kvm_check_async_pf_completion(vcpu) is None
    assert vcpu.run.exit_reason == SEED.interface.exit_reason
    assert vcpu.run.memory_fault.gpa == GFN << 12
    assert GFN not in path.stage.sptes
    assert not kvm_find_async_pf_gfn(vcpu, GFN)


@pytest.mark.parametrize(("dialect", "error_code"), [(SEED, 0), (LINUX_7_3, PFERR_WRITE_MASK)])
def test_as_what_the_fault_is_made_again(path, monkeypatch, dialect, error_code):
    path = path(dialect)
    made = []
    monkeypatch.setattr(
        async_pf_ready,
        "kvm_mmu_do_page_fault",
        lambda _vcpu, gpa, code, *, prefetch: made.append((gpa, code, prefetch)) or 0,
    )
    assert setup(path, error_code=PFERR_WRITE_MASK)
    path.works.pop()()
    kvm_check_async_pf_completion(path.vcpu)
    assert made == [(GFN << 12, error_code, True)]


@pytest.mark.parametrize(
    "work",
    [
        KvmAsyncPf(0, HVA, KvmArchAsyncPf(), wakeup_all=True),
        KvmAsyncPf(0, HVA, KvmArchAsyncPf(direct_map=False)),
    ],
    ids=["for everybody", "of another kind of MMU"],
)
def test_what_is_not_made_again(path, work):
    path = path()
    kvm_arch_async_page_ready(path.vcpu, work)
    assert not path.mm.slow
    assert not path.stage.sptes


def test_a_guest_that_has_gone_to_other_tables_is_not_given_its_page(path, monkeypatch):
    path = path()
    vcpu = path.vcpu
    path.kvm.tdp_enabled = False
    vcpu.sregs.cr0 |= CR0_PG
    vcpu.sregs.cr3 = 0x2000
    monkeypatch.setattr(async_pf_ready, "kvm_mmu_reload", lambda _vcpu: 0)
    work = KvmAsyncPf(GFN << 12, HVA, KvmArchAsyncPf(cr3=0x1000, direct_map=False))
    kvm_arch_async_page_ready(vcpu, work)
    assert not path.mm.slow


def test_the_call_to_everybody_is_one(path):
    vcpu = path().vcpu
    kvm_async_pf_wakeup_all(vcpu)
    kvm_async_pf_wakeup_all(vcpu)
    assert len(vcpu.async_pf.done) == vcpu.async_pf.queued == 1
    kvm_check_async_pf_completion(vcpu)
    assert vcpu.async_pf.queued == 0


def test_a_work_that_was_forgotten_says_nothing(path):
    """Neither one that had not begun, which brings in nothing, nor one that is in its page."""
    path = path()
    vcpu = path.vcpu
    assert setup(path)
    assert setup(path, GFN + 1)
    path.mm.in_gup = lambda: kvm_clear_async_pf_completion_queue(vcpu)
    begun, not_begun = path.works
    begun()
    not_begun()
    assert [hva for hva, _ in path.mm.slow] == [HVA + (GFN << 12)]
    assert not vcpu.async_pf.done
    assert vcpu.requests == {Request.APF_HALT}


# -- the order of requests -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "result"),
    [(Request.TRIPLE_FAULT, 0), (Request.APF_HALT, 1)],
    ids=["TRIPLE_FAULT", "APF_HALT"],
)
def test_what_leaves_before_the_page_fault_is_made(path, request_, result):
    """No exit is prepared while kvm_arch_async_page_ready() faults and may annotate."""
    path = path()
    vcpu = path.vcpu
    assert setup(path)
    path.mm.failing[HVA + (GFN << 12)] = errno.EFAULT
    path.works.pop()()
    vcpu.requests = {request_, Request.APF_READY}
    vcpu.run.exit_reason = uapi.KVM_EXIT_UNKNOWN
    assert vcpu_enter_guest(vcpu) == result
    assert vcpu.requests == {Request.APF_READY}
    assert len(vcpu.async_pf.done) == 1
    expected = uapi.KVM_EXIT_UNKNOWN if result else uapi.KVM_EXIT_SHUTDOWN
    assert vcpu.run.exit_reason == expected
