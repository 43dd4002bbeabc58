"""What KVM_RUN does about a page that is poisoned, on a thread that is prepared or is not."""

from __future__ import annotations

import errno
import signal
import threading
import time

import pytest

from guestfault.errors import Unavailable
from guestfault.fault.outcome import Interrupted, Io, Poisoned, outcome
from guestfault.linux.sigbus import Sigbus, SigbusHeld, take_sigbus
from guestfault.linux.userfaultfd import Feature, Mode, Userfaultfd

pytestmark = pytest.mark.timeout(60)
LOAD_DATA = bytes.fromhex("8b042523010800 e601")  # mov eax, [0x80123]; out 1, al
OUT_FOREVER = bytes.fromhex("e601 ebfc")  # again: out 1, al; jmp again


@pytest.fixture
def poisoned(machine, layout):
    """The machine, with its page of data poisoned in KVM's view, and the page's address."""
    try:
        uffd = Userfaultfd.open(required=Feature.POISON | Feature.SIGBUS | Feature.MISSING_SHMEM)
    except Unavailable as error:
        pytest.skip(f"needs UFFDIO_POISON: {error}")
    page = machine.guest.address + layout.DATA
    machine.guest.no_hugepage()
    with uffd:
        uffd.register(page, layout.PAGE, Mode.MISSING)
        assert uffd.poison(page, layout.PAGE).done == layout.PAGE
        yield page


def test_held_and_open_in_kvm_run_it_ends_the_run_and_says_where(machine, poisoned, layout):
    vcpu = machine.user_vcpu(LOAD_DATA)
    vcpu.set_interrupting_signals({signal.SIGBUS})
    with SigbusHeld():
        for _ in range(3):  # it is met as often as it is tried
            assert vcpu.run() == -errno.EINTR
            told = take_sigbus()
            assert told == Sigbus(poisoned, 12, True)
            assert take_sigbus() is None
            found = outcome(-errno.EINTR, vcpu.kvm_run, machine.interface, sigbus=told)
            assert found == Poisoned(poisoned, 12)
            assert vcpu.get_regs().rip == layout.CODE


def test_blocked_and_not_open_it_is_met_for_ever_until_a_kick(machine, poisoned, layout):
    """Why the two must go together: KVM enters the guest again, for no signal is deliverable."""
    vcpu = machine.user_vcpu(LOAD_DATA)
    with SigbusHeld():
        timer = threading.Timer(0.2, vcpu.kick)
        timer.start()
        began = time.monotonic()
        assert vcpu.run() == -errno.EINTR
        assert time.monotonic() - began > 0.15
        timer.join()
        assert take_sigbus() == Sigbus(poisoned, 12, True)
        assert vcpu.get_regs().rip == layout.CODE


def test_unprepared_the_process_dies_of_it(machine, poisoned, end_of_child):
    from .conftest import Machine

    def unprepared() -> None:
        signal.signal(signal.SIGBUS, signal.SIG_DFL)
        from guestfault.kvm import KvmSystem

        own = Machine(KvmSystem().create_vm())
        uffd = Userfaultfd.open(required=Feature.POISON | Feature.SIGBUS | Feature.MISSING_SHMEM)
        page = own.guest.address + 0x80000
        uffd.register(page, 4096, Mode.MISSING)
        uffd.poison(page, 4096)
        own.user_vcpu(LOAD_DATA).run()

    assert end_of_child(unprepared) == -signal.SIGBUS


def test_a_kick_and_a_poisoned_page_together_lose_neither(machine, poisoned):
    vcpu = machine.user_vcpu(LOAD_DATA)
    vcpu.set_interrupting_signals({signal.SIGBUS})
    with SigbusHeld():
        vcpu.kick()
        assert vcpu.run() == -errno.EINTR
        if (told := take_sigbus()) is None:  # the kick came first
            assert vcpu.run() == -errno.EINTR
            told = take_sigbus()
        assert told == Sigbus(poisoned, 12, True)
        assert vcpu.kvm_run.immediate_exit == 0


def test_every_thread_that_runs_the_vcpu_is_told_itself(machine, poisoned):
    """Invariant: the mask of KVM_RUN is the running thread's, whichever ran the vCPU before."""
    vcpu = machine.user_vcpu(LOAD_DATA)
    vcpu.set_interrupting_signals({signal.SIGBUS})
    told = []

    def run() -> None:
        with SigbusHeld():
            assert vcpu.run() == -errno.EINTR
            told.append(take_sigbus())

    for n in range(1, 4):
        thread = threading.Thread(target=run)
        thread.start()
        thread.join(20)
        assert told == [Sigbus(poisoned, 12, True)] * n


def test_a_sound_guest_runs_and_is_kicked_as_ever(machine):
    vcpu = machine.user_vcpu(OUT_FOREVER)
    vcpu.set_interrupting_signals({signal.SIGBUS})
    with SigbusHeld():
        for _ in range(3):
            assert isinstance(machine.run(vcpu), Io)
            vcpu.kick()
            assert machine.run(vcpu) == Interrupted()
            assert take_sigbus() is None
