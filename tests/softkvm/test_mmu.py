"""The fault path by itself, on a modelled host memory that fails and changes at chosen moments."""

import errno
import select
import threading

import pytest
from tests.softkvm.modelled_mm import (
    HVA,
    NPAGES,
    PROTECTED,
    READ_ONLY,
    WRITABLE,
    WRITE,
    at,
    once,
)

from guestfault.dialect.interface import EHWPOISON
from guestfault.dialect.published import LINUX_6_8
from guestfault.errors import Unavailable
from guestfault.fault.outcome import Poisoned, outcome
from guestfault.linux.sigbus import SigbusHeld, take_sigbus
from guestfault.linux.userfaultfd import Mode, Userfaultfd
from guestfault.softkvm import mmu
from guestfault.softkvm.kvm_host import Request, kvm_make_request
from guestfault.softkvm.memslots import KvmMemorySlot
from guestfault.softkvm.mmu_internal import RetPf
from guestfault.softkvm.refusal import Emulate, Exit, Retry
from guestfault.softkvm.second_stage import PT_WRITABLE
from guestfault.uapi import kvm as uapi
from guestfault.x86.access_kind import AccessKind
from guestfault.x86.registers import PFERR_FETCH_MASK

ABSENT_FLAG = 1 << 2


def test_a_present_page_is_mapped_without_slow_gup(make):
    one = make()
    one.mm.present = one.mm.writable = {HVA + 0x3000}
    assert one.fault(3) == RetPf.FIXED
    assert one.stage.sptes == {3: HVA + 0x3000 | WRITABLE}
    assert one.mm.slow == []
    assert one.fault(3, WRITE) == RetPf.SPURIOUS
    assert (one.vcpu.stat.pf_taken, one.vcpu.stat.pf_fixed, one.vcpu.stat.pf_spurious) == (2, 1, 1)


def test_a_read_fault_is_answered_with_a_writable_page_only_if_that_is_free(make):
    one = make()
    assert one.fault(3) == RetPf.FIXED
    assert one.stage.sptes[3] == HVA + 0x3000 | READ_ONLY
    assert one.mm.slow == [(HVA + 0x3000, False)]
    assert one.fault(3, WRITE) == RetPf.FIXED
    assert one.stage.sptes[3] & PT_WRITABLE


def test_the_flag_means_that_slow_gup_is_not_asked(make):
    one = make(flags=ABSENT_FLAG)
    assert one.fault(5, WRITE) == -errno.EFAULT
    assert one.mm.slow == []
    fault = one.vcpu.run.memory_fault
    assert (one.vcpu.run.exit_reason, fault.gpa, fault.size, fault.flags) == (38, 0x5000, 4096, 2)


@pytest.mark.parametrize(
    ("number", "result"),
    [(errno.EFAULT, -errno.EFAULT), (errno.EINTR, -errno.EINTR)],
)
def test_what_slow_gup_fails_with(make, number, result):
    one = make(LINUX_6_8)
    one.mm.failing[HVA + 0x4000] = number
    one.vcpu.run.exit_reason = 77
    assert one.fault(4) == result
    expected = uapi.KVM_EXIT_INTR if number == errno.EINTR else 77
    assert one.vcpu.run.exit_reason == expected
    assert one.stage.sptes == {}


@pytest.mark.parametrize("prefetch", [False, True])
def test_of_a_broken_page_the_thread_is_told_by_sigbus(make, prefetch):
    one = make(LINUX_6_8)
    one.mm.failing[HVA + 0x4000] = EHWPOISON
    with SigbusHeld():
        assert one.fault(4, prefetch=prefetch) == -errno.EINTR
        assert one.vcpu.run.exit_reason == uapi.KVM_EXIT_INTR
        told = take_sigbus()
        found = outcome(-errno.EINTR, one.vcpu.run, LINUX_6_8.interface, sigbus=told)
        assert found == Poisoned(HVA + 0x4000, 12, action_required=True)
        assert take_sigbus() is None
    assert one.stage.sptes == {}


def test_no_slot_is_a_device(make):
    assert make().fault(NPAGES) == RetPf.EMULATE


def test_a_write_to_a_read_only_slot_is_emulated_and_a_read_maps_it_so(make):
    one = make(flags=uapi.KVM_MEM_READONLY)
    one.mm.present = one.mm.writable = {HVA}
    assert one.fault(0) == RetPf.FIXED
    assert one.stage.sptes[0] == HVA | READ_ONLY
    assert one.fault(0, WRITE) == RetPf.EMULATE
    assert (HVA, True) not in one.mm.fast


def test_a_logged_page_is_writable_only_after_a_write(make):
    one = make(flags=uapi.KVM_MEM_LOG_DIRTY_PAGES)
    one.mm.present = one.mm.writable = {HVA}
    assert one.fault(0) == RetPf.FIXED
    assert not one.stage.sptes[0] & PT_WRITABLE
    assert one.vm.get_dirty_log(0)[0] == 0
    assert one.fault(0, WRITE) == RetPf.FIXED
    assert one.stage.sptes[0] & PT_WRITABLE
    assert one.vm.get_dirty_log(0)[0] == 1
    assert not one.stage.sptes[0] & PT_WRITABLE


def test_a_page_that_goes_in_the_middle_of_gup_is_not_installed(make):
    """mmu_invalidate_seq: found before the invalidation, to be installed after it."""
    one = make()
    one.mm.in_gup = once(one.invalidate)
    assert one.fault(0, WRITE) == RetPf.RETRY
    assert one.stage.sptes == {}
    one.mm.present.clear()
    assert one.fault(0, WRITE) == RetPf.FIXED


def test_nothing_is_installed_while_an_invalidation_is_in_progress(make):
    one = make()
    one.mm.present = one.mm.writable = {HVA, HVA + 0x1000}
    assert one.fault(0) == RetPf.FIXED
    one.vm.invalidate_range_start(HVA, HVA + 0x1000)
    assert one.stage.sptes == {}
    one.vm.invalidate_range_start(HVA + 0x8000, HVA + 0x9000)
    assert one.fault(0) == RetPf.RETRY
    one.vm.invalidate_range_end(HVA, HVA + 0x1000)
    assert one.fault(0) == RetPf.RETRY  # the other one still is
    one.vm.invalidate_range_end(HVA + 0x8000, HVA + 0x9000)
    assert one.fault(0) == RetPf.FIXED


def test_a_slot_deleted_in_the_middle_of_gup(make):
    one = make()
    one.mm.in_gup = lambda: one.vm.set_user_memory_region(0, 0, 0, 0)
    assert one.fault(0, WRITE) == RetPf.RETRY
    assert one.stage.sptes == {}
    assert one.fault(0) == RetPf.EMULATE


def test_an_invalidation_zaps_its_range_and_no_more(make):
    one = make()
    one.all_present()
    for gfn in range(NPAGES):
        one.fault(gfn)
    one.vm.invalidate_range_start(HVA + 0x2800, HVA + 0x5001)
    one.vm.invalidate_range_end(HVA + 0x2800, HVA + 0x5001)
    assert set(range(NPAGES)) - one.stage.sptes.keys() == {2, 3, 4, 5}
    one.vm.invalidate_range_start(0, HVA)
    one.vm.invalidate_range_end(0, HVA)
    assert len(one.stage.sptes) == NPAGES - 4


def test_a_prefetch_is_not_counted_as_the_guest_s(make):
    one = make()
    one.mm.present = one.mm.writable = {HVA}
    assert one.fault(0, prefetch=True) == RetPf.FIXED
    assert one.fault(0, prefetch=True) == RetPf.SPURIOUS
    stat = one.vcpu.stat
    assert (stat.pf_taken, stat.pf_fixed, stat.pf_spurious) == (0, 1, 0)


def test_slots_that_share_memory_are_both_zapped(make):
    one = make()
    one.vm.set_user_memory_region(1, 0x10_0000, 0x2000, HVA)
    one.mm.present = one.mm.writable = {HVA}
    one.fault(0)
    one.fault(0x100)
    one.vm.invalidate_range_start(HVA, HVA + 1)
    assert one.stage.sptes == {}
    one.vm.invalidate_range_end(HVA, HVA + 1)


def test_hva_of_a_gfn():
    assert KvmMemorySlot(0, 0x100, 4, HVA, 0).hva_of_gfn(0x102) == HVA + 0x2000


# -- kvm_mmu_page_fault: what a violation comes to -------------------------------------------------


def test_a_violation_that_is_resolved_resumes_the_guest(make):
    one = make()
    one.all_present()
    assert one.violation(3)
    assert one.violation(3, WRITE)  # SPURIOUS: another vCPU was faster


@pytest.mark.parametrize(
    ("number", "result"), [(errno.EFAULT, errno.EFAULT), (EHWPOISON, errno.EINTR)]
)
def test_a_violation_that_fails_leaves_for_userspace(make, number, result):
    one = make(LINUX_6_8)
    one.mm.failing[HVA] = number
    with SigbusHeld():
        assert not one.violation(0)
    assert one.vcpu.refusal == Exit(-result)


@pytest.mark.parametrize(
    ("code", "kind"),
    [(0, AccessKind.READ), (WRITE, AccessKind.WRITE), (PFERR_FETCH_MASK, AccessKind.FETCH)],
)
def test_a_violation_where_no_memory_is_goes_to_the_emulator(make, code, kind):
    one = make()
    assert not one.violation(NPAGES, code)
    assert one.vcpu.refusal == Emulate(NPAGES << 12, kind)


def test_a_violation_that_must_be_retried_goes_back_to_the_run_loop(make):
    one = make()
    one.mm.in_gup = one.invalidate
    assert not one.violation(0)
    assert isinstance(one.vcpu.refusal, Retry)


def test_a_fault_that_nobody_handles_is_a_bug_and_no_endless_loop(make, monkeypatch):
    """INVALID is never the end of a fault: kvm_mmu_page_fault() makes it KVM_BUG and -EIO."""
    one = make()
    monkeypatch.setattr(mmu, "direct_page_fault", lambda *_: RetPf.INVALID)
    with pytest.warns(UserWarning, match="nobody has handled"):
        assert not one.violation(0)
    assert one.vcpu.refusal == Exit(-errno.EIO)


def test_the_pages_that_another_handler_is_set_for_go_to_it(make):
    one = make()
    seen = []
    one.vcpu.mmu_page_fault = lambda _vcpu, fault: seen.append(fault.addr) or RetPf.FIXED
    assert one.fault(3) == RetPf.FIXED
    assert (seen, one.stage.sptes) == ([0x3000], {})


# -- waiting for a page ----------------------------------------------------------------------------


def test_a_signal_ends_the_sleep(make):
    one = make()
    one.mm.slow_to_come = {HVA}
    one.mm.asleep = lambda: kvm_make_request(one.vcpu, Request.SIGNAL)
    assert one.fault(0) == -errno.EINTR
    assert one.vcpu.run.exit_reason == uapi.KVM_EXIT_INTR
    assert one.stage.sptes == {}


class Apf:
    """Asynchronous page faults that this VM's vCPU could do, recorded."""

    def __init__(self, monkeypatch, *, can=True, found=False, setup=True):
        self.asked = []
        monkeypatch.setattr(mmu, "kvm_can_do_async_pf", lambda _: can)
        monkeypatch.setattr(mmu, "kvm_find_async_pf_gfn", lambda _, gfn: found)
        monkeypatch.setattr(mmu, "kvm_arch_setup_async_pf", self._setup)
        self.answer = setup

    def _setup(self, _vcpu, *arguments):
        self.asked.append(arguments)
        return self.answer


def test_a_page_that_takes_long_is_left_to_a_worker(make, monkeypatch):
    one, apf = make(), Apf(monkeypatch)
    one.mm.slow_to_come = {HVA + 0x2000}
    assert one.fault(2, WRITE) == RetPf.RETRY
    assert apf.asked == [(0x2000, 2, HVA + 0x2000, WRITE)]
    assert one.mm.slow == [(HVA + 0x2000, True)]  # asked once, without waiting


def test_a_page_that_a_worker_is_at_halts_the_vcpu(make, monkeypatch):
    one, apf = make(), Apf(monkeypatch, found=True)
    one.mm.slow_to_come = {HVA}
    assert one.fault(0) == RetPf.RETRY
    assert Request.APF_HALT in one.vcpu.requests
    assert apf.asked == []


@pytest.mark.parametrize("options", [{"setup": False}, {"can": False}])
def test_where_no_worker_can_be_had_the_vcpu_waits_itself(make, monkeypatch, options):
    one = make()
    Apf(monkeypatch, **options)
    one.mm.slow_to_come = {HVA}
    one.mm.asleep = lambda: one.mm.bring_in(HVA)
    assert one.fault(0) == RetPf.FIXED


def test_what_comes_without_waiting_needs_no_worker(make, monkeypatch):
    one, apf = make(), Apf(monkeypatch)
    assert one.fault(0) == RetPf.FIXED
    assert apf.asked == []


def test_a_page_that_cannot_be_had_is_not_waited_for(make, monkeypatch):
    """async is for a mapping that permits the access; others fail now, or would do so for ever."""
    one, apf = make(LINUX_6_8), Apf(monkeypatch)
    one.mm.slow_to_come, one.mm.valid = {HVA}, False
    assert one.fault(0) == -errno.EFAULT
    assert apf.asked == []


def test_a_prefetch_is_no_reason_to_begin_another(make, monkeypatch):
    """kvm_arch_async_page_ready() makes the fault again, and waits if it must."""
    one, apf = make(), Apf(monkeypatch)
    one.mm.slow_to_come = {HVA}
    assert one.fault(0, prefetch=True) == RetPf.FIXED
    assert apf.asked == []


def test_a_slot_that_wants_to_be_told_is_told_and_not_waited_for(make, monkeypatch):
    one, apf = make(flags=ABSENT_FLAG), Apf(monkeypatch)
    one.mm.slow_to_come = {HVA}
    assert one.fault(0) == -errno.EFAULT
    assert (apf.asked, one.mm.slow) == ([], [])
    assert one.vcpu.run.exit_reason == 38


# -- races with what changes the slots -------------------------------------------------------------


def test_a_slot_on_its_way_out_is_neither_memory_nor_a_device(make):
    """Memory never passes for MMIO while it is there: RETRY until the slot has gone."""
    one = make()
    one.all_present()
    results = []
    with at("zap_memslot: take mmu_lock", lambda: results.append(one.fault(0))):
        one.slot(npages=0)
    assert results == [RetPf.RETRY]
    assert one.fault(0) == RetPf.EMULATE


def test_an_invalidation_elsewhere_in_progress_holds_nobody_off(make):
    one = make()
    one.all_present()
    one.vm.invalidate_range_start(HVA + 0x8000, HVA + 0x9000)
    assert one.fault(0) == RetPf.FIXED
    assert one.fault(8) == RetPf.RETRY
    one.vm.invalidate_range_end(HVA + 0x8000, HVA + 0x9000)


def test_a_page_protected_for_the_log_keeps_what_it_may_become(make):
    one = make(flags=uapi.KVM_MEM_LOG_DIRTY_PAGES)
    one.all_present()
    assert one.fault(0) == RetPf.FIXED
    assert one.stage.sptes[0] == HVA | PROTECTED


# -- with a guest ----------------------------------------------------------------------------------


@pytest.mark.timeout(30)
def test_a_vcpu_asleep_in_userfaultfd_is_kicked_out_and_sleeps_again(soft):
    """A kick is answered though the page never comes, and the access is not lost: it is made
    again, by the same sleep, and goes on when the page is there.
    """
    machine = soft("8b07" + "e6f4", dialect="linux-6.8", rdi=0x4_0000)  # mov eax, [rdi]
    machine.write(0x4_0000, (1234).to_bytes(4, "little"))
    try:
        uffd = Userfaultfd.open()
    except Unavailable as e:
        pytest.skip(str(e))
    guest, results = machine.ram.guest, []
    run = lambda: results.append(machine.vcpu.run())  # noqa: E731
    with uffd:
        guest.discard(0x4_0000, 0x1000)
        uffd.register(guest.address + 0x4_0000, 0x1000, Mode.MISSING | Mode.MINOR)
        poll = select.poll()
        poll.register(uffd.fileno(), select.POLLIN)
        for turn in range(2):
            runs = threading.Thread(target=run)
            runs.start()
            if turn == 0:
                assert poll.poll(10_000)
                assert len(uffd.read_events()) == 1
            machine.vcpu.kick()
            runs.join()
            assert results.pop() == -errno.EINTR
        runs = threading.Thread(target=run)
        runs.start()
        assert uffd.continue_(guest.address + 0x4_0000, 0x1000).done == 0x1000
        runs.join()
    assert results == [0]
    assert machine.vcpu.get_regs().rax == 1234
