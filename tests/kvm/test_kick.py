import ctypes
import errno
import os
import random
import signal
import threading
import time

import pytest

from guestfault.fault.outcome import Interrupted, Io
from guestfault.kvm.call import kvm_call
from guestfault.kvm.kick import KICK_SIGNAL
from guestfault.linux.ioctl import ioctl, syscall
from guestfault.uapi import userfaultfd as uffd_uapi

SPIN = b"\xeb\xfe"
OUT_FOREVER = bytes.fromhex("e601 ebfc")  # again: out 1, al; jmp again
LOAD_DATA = bytes.fromhex("8b042523010800 e601")  # mov eax, [0x80123]; out 1, al


class Runner(threading.Thread):
    """Runs a vCPU until told to stop; counts what comes back."""

    def __init__(self, vcpu):
        super().__init__(daemon=True)
        self.vcpu = vcpu
        self.left_pending = None
        self.running = threading.Event()
        self.done = False
        self.interrupted = 0
        self.exits = 0
        self.strange = []

    def run(self):
        self.running.set()
        while not self.done:
            ret = self.vcpu.run()
            if ret == -errno.EINTR:
                self.interrupted += 1
            elif ret == 0:
                self.exits += 1
            else:
                self.strange.append(ret)
        self.left_pending = KICK_SIGNAL in signal.sigpending()

    def stop(self):
        self.done = True
        self.vcpu.kick()
        self.join(10)
        assert not self.is_alive()
        assert not self.strange
        assert self.left_pending is False


def wait_until(condition, seconds=10.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0)


@pytest.fixture(autouse=True)
def no_signal_escapes():
    """The kick signal is never delivered: a handler, and the fatal default, must not be reached."""
    delivered = []
    before = signal.signal(KICK_SIGNAL, lambda *args: delivered.append(args))
    yield
    signal.signal(KICK_SIGNAL, before)
    assert not delivered


def test_kick_before_run(machine):
    vcpu = machine.user_vcpu(OUT_FOREVER)
    vcpu.kick()
    assert vcpu.kvm_run.immediate_exit == 1
    assert machine.run(vcpu) == Interrupted()
    assert vcpu.kvm_run.immediate_exit == 0
    assert isinstance(machine.run(vcpu), Io)


def test_kicks_before_run_are_one(machine):
    vcpu = machine.user_vcpu(OUT_FOREVER)
    for _ in range(100):
        vcpu.kick()
    assert machine.run(vcpu) == Interrupted()
    assert isinstance(machine.run(vcpu), Io)


@pytest.mark.parametrize("disposition", [signal.SIG_DFL, signal.SIG_IGN])
def test_spinning_guest_whatever_the_signal_would_do(machine, disposition):
    signal.signal(KICK_SIGNAL, disposition)
    runner = Runner(machine.user_vcpu(SPIN))
    runner.start()
    for n in range(1, 20):
        time.sleep(0.001)
        runner.vcpu.kick()
        wait_until(lambda n=n: runner.interrupted >= n)
    runner.stop()
    assert runner.exits == 0


def test_every_kick_is_answered(machine):
    """Against a guest that is in and out of KVM_RUN all the time: a kick falls into every gap."""
    runner = Runner(machine.user_vcpu(OUT_FOREVER))
    runner.start()
    wait_until(lambda: runner.exits > 10)
    for _ in range(1000):
        before = runner.interrupted
        runner.vcpu.kick()
        wait_until(lambda before=before: runner.interrupted > before)
    runner.stop()
    assert runner.exits > 10


@pytest.mark.parametrize("code", [SPIN, OUT_FOREVER])
def test_storm_leaves_nothing_behind(machine, code):
    runner = Runner(machine.user_vcpu(code))
    runner.start()
    runner.running.wait(10)

    def storm(seed):
        dice = random.Random(seed)
        for _ in range(2000):
            runner.vcpu.kick()
            if dice.random() < 0.1:
                time.sleep(dice.random() * 1e-4)

    kickers = [threading.Thread(target=storm, args=(seed,)) for seed in range(2)]
    for kicker in kickers:
        kicker.start()
    for kicker in kickers:
        kicker.join(30)
    before = runner.interrupted
    runner.vcpu.kick()
    wait_until(lambda: runner.interrupted > before)
    if code == OUT_FOREVER:
        # All kicks are answered: the guest runs on without one interruption more.
        time.sleep(0.001)
        settled, exits = runner.interrupted, runner.exits
        wait_until(lambda: runner.exits > exits + 500)
        assert runner.interrupted == settled
    runner.stop()


def test_no_signal_is_sent_outside_of_run(machine):
    """The thread that ran the vCPU last may do something else now, or be gone."""
    vcpu = machine.user_vcpu(OUT_FOREVER)
    assert vcpu.run() == 0
    vcpu.kick()
    assert KICK_SIGNAL not in signal.sigpending()
    assert [vcpu.run(), vcpu.run()] == [-errno.EINTR, 0]
    for _ in range(20):
        thread = threading.Thread(target=vcpu.run)
        thread.start()
        thread.join(10)
        vcpu.kick()
        assert [vcpu.run(), vcpu.run()] == [-errno.EINTR, 0]


def test_kick_that_is_too_late_for_a_run_ends_the_next(machine):
    """KVM_RUN is through with an exit of its own, and its thread has not said so yet."""
    vcpu = machine.user_vcpu(OUT_FOREVER)
    vcpu._kicks.enter(vcpu._fd)
    vcpu.kick()
    vcpu._kicks.leave(0)
    assert KICK_SIGNAL not in signal.sigpending()
    assert [vcpu.run(), vcpu.run()] == [-errno.EINTR, 0]


def test_every_thread_that_runs_the_vcpu_is_masked(machine):
    """A second thread, in which the signal is open at first, is kicked as safely as the first."""
    vcpu = machine.user_vcpu(SPIN)
    results = []

    def run_with_the_signal_open():
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {KICK_SIGNAL})
        results.append(vcpu.run())

    for n in range(1, 3):
        thread = threading.Thread(target=run_with_the_signal_open)
        thread.start()
        wait_until(lambda: vcpu._kicks._inside is not None)
        time.sleep(0.005)
        vcpu.kick()
        thread.join(10)
        assert results == [-errno.EINTR] * n


def test_two_vcpus_are_kicked_apart(machine):
    runners = [Runner(machine.user_vcpu(SPIN, n)) for n in range(2)]
    for runner in runners:
        runner.start()
        runner.running.wait(10)
    for _ in range(20):
        before = runners[0].interrupted
        runners[0].vcpu.kick()
        wait_until(lambda before=before: runners[0].interrupted > before)
    assert runners[1].interrupted == 0
    for runner in runners:
        runner.stop()


def test_kick_from_a_signal_handler_of_the_thread_that_runs(machine):
    """Python runs handlers between bytecodes, so also in the middle of run()."""
    vcpu = machine.user_vcpu(OUT_FOREVER)
    kicks = 0

    def handler(*_):
        nonlocal kicks
        kicks += 1
        vcpu.kick()

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    interrupted = 0
    deadline = time.monotonic() + 20
    try:
        while kicks < 200:
            assert time.monotonic() < deadline
            interrupted += vcpu.run() == -errno.EINTR
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted > 0
    results = [vcpu.run() for _ in range(5)]
    assert results[1:] == [0] * 4  # at most one kick was left over


def test_kick_of_a_halted_vcpu(machine):
    """With KVM's own interrupt controller a halted vCPU sleeps inside KVM_RUN."""
    kvm_call(machine.vm._fd, "KVM_CREATE_IRQCHIP")
    runner = Runner(machine.real_vcpu(b"\xf4"))
    runner.start()
    runner.running.wait(10)
    time.sleep(0.02)
    assert runner.exits == 0
    before = runner.interrupted
    runner.vcpu.kick()
    wait_until(lambda: runner.interrupted > before)
    runner.stop()


@pytest.fixture
def uffd():
    fd = syscall(uffd_uapi.SYS_userfaultfd, os.O_CLOEXEC | os.O_NONBLOCK)
    if fd < 0:
        pytest.skip(f"no userfaultfd ({errno.errorcode[-fd]})")
    yield fd
    os.close(fd)


def test_kick_of_a_vcpu_that_sleeps_in_userfaultfd(machine, layout, uffd):
    """Nobody resolves the fault; the kick gets the vCPU out, and the fault is still there."""
    api = uffd_uapi.uffdio_api(api=uffd_uapi.UFFD_API)
    assert ioctl(uffd, uffd_uapi.UFFDIO_API, ctypes.byref(api)) == 0
    where = machine.guest.address + layout.DATA
    register = uffd_uapi.uffdio_register(
        uffd_uapi.uffdio_range(where, layout.PAGE), uffd_uapi.UFFDIO_REGISTER_MODE_MISSING
    )
    runner = Runner(machine.user_vcpu(LOAD_DATA))
    assert ioctl(uffd, uffd_uapi.UFFDIO_REGISTER, ctypes.byref(register)) == 0
    runner.start()
    runner.running.wait(10)
    time.sleep(0.02)
    assert (runner.exits, runner.interrupted) == (0, 0)
    for n in range(1, 5):
        runner.vcpu.kick()
        wait_until(lambda n=n: runner.interrupted >= n)
        time.sleep(0.005)
    assert runner.exits == 0
    runner.stop()
    assert runner.vcpu.get_regs().rip == layout.CODE


def test_other_signals_still_interrupt(machine):
    """What the thread had not blocked gets through KVM_RUN too, and to its own handler."""
    vcpu = machine.user_vcpu(SPIN)
    seen = []
    before = signal.signal(signal.SIGALRM, lambda *_: seen.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.02)
        assert vcpu.run() == -errno.EINTR
    finally:
        signal.signal(signal.SIGALRM, before)
    assert seen == [1]
    assert vcpu.kvm_run.immediate_exit == 0


def test_blocked_signals_stay_blocked(machine):
    """KVM_SET_SIGNAL_MASK replaces the mask for KVM_RUN; it must not open what was shut."""
    vcpu = machine.user_vcpu(SPIN)
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})
    timer = threading.Timer(0.1, vcpu.kick)
    try:
        signal.pthread_kill(threading.get_ident(), signal.SIGUSR2)
        started = time.monotonic()
        timer.start()
        ret = vcpu.run()
        lasted = time.monotonic() - started
        timer.join()
    finally:
        pending = signal.sigtimedwait({signal.SIGUSR2}, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    assert ret == -errno.EINTR
    assert lasted > 0.05
    assert pending is not None
