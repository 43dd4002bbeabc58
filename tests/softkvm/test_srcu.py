"""Who reads the memory slots, and that a change of slots waits for them and for nobody else."""

import errno
import time

import pytest
from tests.softkvm.modelled_mm import PRESENT, WRITE, at

from guestfault.errors import KvmError, Unavailable
from guestfault.fault.outcome import Interrupted, Io
from guestfault.linux.userfaultfd import Mode, Userfaultfd
from guestfault.softkvm.mmu_internal import RetPf
from guestfault.softkvm.second_stage import PT_WRITABLE
from guestfault.softkvm.srcu import kvm_vcpu_srcu_read_lock, kvm_vcpu_srcu_read_unlock
from guestfault.uapi import kvm as uapi

FOREVER, HLT, END = "ebfe", "f4", "e6f4"
DATA = 0x4_0000
LEAVE = "kvm_arch_vcpu_ioctl_run: leave"
pytestmark = pytest.mark.timeout(30)


def add_slot(machine):
    """A change of slots that has nothing to do with what the guest uses."""
    machine.vm.set_user_memory_region(1, 1 << 30, 0x1000, machine.ram.guest.address)


def absent(machine):
    """The whole of memory under userfaultfd, and the guest's data not there."""
    try:
        uffd = Userfaultfd.open()
    except Unavailable as why:
        pytest.skip(str(why))
    machine.bring_in(0, machine.RAM_SIZE)
    uffd.register(machine.ram.guest.address, machine.RAM_SIZE, Mode.MISSING | Mode.MINOR)
    machine.discard(DATA)
    return uffd


# -- the sequence number ---------------------------------------------------------------------------


def test_a_change_waits_for_who_reads(make, background):
    """When KVM_SET_USER_MEMORY_REGION returns, nobody uses what the old slot was backed by."""
    one = make()
    kvm_vcpu_srcu_read_lock(one.vcpu)
    change = background(one.slot, 0x1)
    assert change.is_running()
    kvm_vcpu_srcu_read_unlock(one.vcpu)
    change.result(5)


def test_a_change_does_not_wait_for_who_reads_again(make, background):
    """No vCPU can hold a change up for ever by handling one fault after another."""
    one = make()
    kvm_vcpu_srcu_read_lock(one.vcpu)
    change = background(one.slot, 0x1)
    assert change.is_running()
    kvm_vcpu_srcu_read_unlock(one.vcpu)
    kvm_vcpu_srcu_read_lock(one.vcpu)
    change.result(5)
    kvm_vcpu_srcu_read_unlock(one.vcpu)


def test_unlocking_twice_is_harmless(make):
    """After an exception in between: nobody is left to wait for."""
    one = make()
    kvm_vcpu_srcu_read_lock(one.vcpu)
    kvm_vcpu_srcu_read_lock(one.vcpu)
    kvm_vcpu_srcu_read_unlock(one.vcpu)
    kvm_vcpu_srcu_read_unlock(one.vcpu)
    one.slot(0x1)


def test_a_slot_is_deleted_in_the_middle_of_gup(make, background):
    """Its host address may be used until KVM_SET_USER_MEMORY_REGION returns, and no longer."""
    one, during = make(), []
    kvm_vcpu_srcu_read_lock(one.vcpu)

    def in_gup():
        during.append(background(lambda: one.slot(npages=0)))
        assert during[0].is_running()

    one.mm.in_gup = in_gup
    assert one.fault(0, WRITE) in (RetPf.FIXED, RetPf.RETRY)
    kvm_vcpu_srcu_read_unlock(one.vcpu)
    during[0].result(5)
    assert one.stage.sptes == {}


def test_a_log_begins_in_the_middle_of_a_fault(make, background):
    """Every write to a page after the log began is in it."""
    one, during = make(), []
    kvm_vcpu_srcu_read_lock(one.vcpu)

    def in_gup():
        during.append(background(one.slot, uapi.KVM_MEM_LOG_DIRTY_PAGES))
        assert during[0].is_running()

    one.mm.in_gup = in_gup
    assert one.fault(0, WRITE) == RetPf.FIXED  # without the log, as it found the slot
    assert one.stage.sptes[0] & PT_WRITABLE
    kvm_vcpu_srcu_read_unlock(one.vcpu)
    during[0].result(5)
    assert not one.stage.sptes[0] & PT_WRITABLE
    assert one.fault(0, WRITE | PRESENT) == RetPf.FIXED
    assert one.vm.get_dirty_log(0)[0] == 1


def test_a_signal_handler_that_would_wait_for_its_own_thread_is_told(make):
    one = make()
    kvm_vcpu_srcu_read_lock(one.vcpu)
    with pytest.raises(KvmError) as refused:
        one.slot(npages=0)
    assert refused.value.errno == errno.EDEADLK
    kvm_vcpu_srcu_read_unlock(one.vcpu)
    one.slot(npages=0)


# -- vCPUs that run --------------------------------------------------------------------------------


def test_nobody_reads_in_guest_mode(soft, background):
    machine = soft(FOREVER)
    run = background(machine.run)
    assert run.is_running()
    add_slot(machine)
    machine.vm.set_user_memory_region(1, 0, 0, 0)
    machine.vcpu.kick()
    assert isinstance(run.result(5), Interrupted)


def test_nobody_reads_while_halted(soft, background):
    machine = soft(HLT, "long-cpl0", irqchip=True)
    run = background(machine.run)
    assert run.is_running()
    add_slot(machine)
    machine.vcpu.kick()
    assert isinstance(run.result(5), Interrupted)


def test_nobody_reads_before_it_is_started(soft, background):
    machine = soft(irqchip=True)
    second = machine.add_vcpu(1)
    assert second.get_mp_state() == uapi.KVM_MP_STATE_UNINITIALIZED
    run = background(second.run)
    assert run.is_running()
    add_slot(machine)
    second.kick()
    assert run.result(5) == -errno.EINTR


def test_nobody_reads_after_an_exit_or_an_error(soft, monkeypatch):
    machine = soft(END)
    assert machine.trace() == []
    machine.vcpu.translate(DATA)
    machine.vcpu.get_msrs([0xC0000080])
    with pytest.raises(KvmError):
        machine.vcpu.set_msrs({0x1234: 0})
    add_slot(machine)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("guestfault.softkvm.vcpu.tlb_fill", interrupted)
    machine.vcpu.set_sregs(machine.vcpu.get_sregs())
    with pytest.raises(KeyboardInterrupt):
        machine.vcpu.run()
    machine.vm.set_user_memory_region(1, 0, 0, 0)


def test_changes_while_a_guest_runs_are_quick_and_leave_it_alone(soft, background):
    """No change waits for more than one fault, and no access of the guest is lost."""
    # again: inc dword [rdi]; dec rcx; jnz again
    machine = soft("ff07 48ffc9 75f9" + END, rdi=DATA, rcx=200_000)
    run = background(machine.trace)
    changes, began = 0, time.monotonic()
    while run.is_running(0):
        add_slot(machine)
        machine.vm.set_user_memory_region(1, 0, 0, 0)
        changes += 2
    assert run.result() == []
    assert machine.word(DATA, 4) == 200_000
    assert changes > 10 * (time.monotonic() - began)


def test_a_change_waits_for_a_page_and_a_kick_ends_that(soft, background):
    """As in Linux: who sleeps in slow GUP reads on.  Nobody waits for ever all the same."""
    machine = soft("8b07" + END, rdi=DATA)
    with absent(machine):
        run = background(machine.run)
        assert run.is_running()
        change = background(add_slot, machine)
        assert change.is_running()
        machine.vcpu.kick()
        assert isinstance(run.result(5), Interrupted)
        change.result(5)


def test_closing_while_a_change_waits_for_a_page(soft, background):
    """SoftVm.close() kicks: neither it nor the change is left to wait for a page."""
    machine = soft("8b07" + END, rdi=DATA)
    with absent(machine):
        run = background(machine.vcpu.run)
        assert run.is_running()
        change = background(machine.vm.set_user_memory_region, 0, 0, 0, 0)
        assert change.is_running()
        background(machine.vm.close).result(5)
        assert run.result(5) == -errno.EINTR
        change.result(5)


# -- kicks, at their point -------------------------------------------------------------------------


def test_a_kick_as_a_run_ends_is_kept_for_the_next(soft):
    """No kick is lost, and none is answered twice."""
    machine = soft("e642" + END)
    with at(LEAVE, machine.vcpu.kick):
        assert machine.vcpu.run() == 0
    assert isinstance(machine.run(), Interrupted)
    assert machine.vcpu.kvm_run.immediate_exit == 0
    assert machine.trace() == []


@pytest.mark.parametrize("point", ["vcpu_enter_guest: enter", "vcpu_enter_guest: leave"])
def test_a_kick_on_the_way_is_answered_by_this_run(soft, point):
    machine = soft(FOREVER if point.endswith("enter") else "0f0b" + END)
    with at(point, machine.vcpu.kick):
        assert isinstance(machine.run(), Interrupted)
    assert machine.vcpu.kvm_run.immediate_exit == 0
    assert not machine.vcpu.arch.requests


def test_a_stop_that_comes_too_late_does_not_end_vmrun(soft):
    """A kick between the engine's return and the end of guest mode leaves the flag set."""
    machine = soft("e642" + END)
    assert isinstance(machine.run(), Io)
    sregs = machine.vcpu.get_sregs()
    machine.vcpu.arch.cpu.stop()
    machine.vcpu.set_sregs(sregs)  # VMRUN before the next entry
    assert machine.trace() == []
    assert bytes(machine.vcpu.get_sregs()) == bytes(sregs)
