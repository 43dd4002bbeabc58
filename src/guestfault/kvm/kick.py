"""How another thread makes ``KVM_RUN`` return.

A vCPU that runs, halts, or sleeps in a page fault under userfaultfd comes back on its own when it
likes; a VMM that must stop it now *kicks* it.  Linux has two means, and each alone leaves a hole.
``kvm_run.immediate_exit`` is read once, as ``KVM_RUN`` begins: too late for a guest that is in.  A
signal ends a ``KVM_RUN`` in progress, but one that arrives just before it is handled and gone, and
its handler must be installed by Python's main thread.

Together, without a handler:

- the thread that runs a vCPU **blocks** :data:`KICK_SIGNAL` for good, so that it is never
  delivered: it can only be pending, and neither kills the process nor runs anybody's handler;
- ``KVM_SET_SIGNAL_MASK`` unblocks it **inside** ``KVM_RUN`` only.  A pending one, whether it came
  before or during, makes KVM return -EINTR, and is blocked again before it could be delivered
  (``kvm_sigset_activate`` in virt/kvm/kvm_main.c);
- :meth:`KickSwitch.kick` sets ``immediate_exit``, and sends the signal only while a thread is
  between :meth:`KickSwitch.enter` and :meth:`KickSwitch.leave`, and only once: no thread gets a
  signal that is not meant for it, whatever its id is reused for;
- :meth:`KickSwitch.leave` takes the pending signal away again, so that one kick costs one -EINTR.

Other signals get through as they would without KVM: the mask inside is the thread's own when it
first ran the vCPU, less this signal.  One that it blocks later still ends its runs.

**The same means serve SIGBUS**, by which KVM tells the thread that an access met broken memory
(:mod:`guestfault.linux.sigbus`): blocked in the thread, open inside, it ends the run and is still
pending when the run has ended, to be taken with all that it says (:meth:`KickSwitch.open`).  For a
thread that blocks it and does not open it here KVM_RUN never ends: KVM sends the signal, enters the
guest again because none can be delivered, meets the same page, and so on until it is kicked.

What follows is the promise of :meth:`~guestfault.kvm.protocols.Vcpu.kick`: after a kick, -EINTR is
returned at least once.  Kicks that meet in one run are one.
"""

from __future__ import annotations

import errno
import signal
import threading
from collections.abc import Iterable
from ctypes import byref

from guestfault.kvm.call import kvm_call
from guestfault.kvm.run_area import RunArea
from guestfault.uapi import kvm as uapi

__all__ = ["KICK_SIGNAL", "KickSwitch"]

KICK_SIGNAL = signal.SIGRTMIN
"""Blocked for good in every thread that has run a vCPU.  (Firecracker and kvmtool use it too.)"""

_KERNEL_SIGSET_SIZE = 8  # bytes; not glibc's 128


class _ThisThread(threading.local):
    def __init__(self) -> None:
        self.token = object()


# A thread's id may be that of a dead one; its token is its own.
_this_thread = _ThisThread()


class KickSwitch:
    """The kicks of the vCPU whose ``kvm_run`` is in ``area``."""

    def __init__(self, area: RunArea) -> None:
        self._area = area
        # Reentrant: a Python signal handler may kick in the midst of enter() or leave(), which
        # order their assignments so that it finds a state in which its kick is not lost.
        self._lock = threading.RLock()
        self._masked_for: object = None
        self._open = {KICK_SIGNAL}
        self._inside: int | None = None
        self._kicked = False
        self._signalled = False

    def kick(self) -> None:
        """From any thread: end the run in progress, or else the next one, with -EINTR."""
        with self._lock:
            self._kicked = True
            self._area.kvm_run.immediate_exit = 1
            if self._inside is not None and not self._signalled:
                self._signalled = True
                signal.pthread_kill(self._inside, KICK_SIGNAL)

    def open(self, signals: Iterable[signal.Signals]) -> None:
        """From the next run on: these end a run even where its thread blocks them."""
        self._open = {KICK_SIGNAL, *signals}
        self._masked_for = None

    def enter(self, fd: int) -> None:
        """Before ``KVM_RUN`` on the vCPU's ``fd``, in the thread that will issue it."""
        if self._masked_for is not _this_thread.token:
            self._mask_this_thread(fd)
        with self._lock:
            self._inside = threading.get_ident()

    def leave(self, ret: int) -> None:
        """After ``KVM_RUN``, in the same thread, with its result."""
        with self._lock:
            self._inside = None
            signalled, self._signalled = self._signalled, False
            if ret == -errno.EINTR and self._kicked:
                self._kicked = False
                self._area.kvm_run.immediate_exit = 0
        if signalled:
            signal.sigtimedwait({KICK_SIGNAL}, 0)

    def _mask_this_thread(self, fd: int) -> None:
        """Block the signal in this thread, and let it through in this thread's ``KVM_RUN``."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {KICK_SIGNAL}) - self._open
        sigset = sum(1 << (number - 1) for number in blocked)
        mask = uapi.flexible(uapi.kvm_signal_mask, _KERNEL_SIGSET_SIZE)(len=_KERNEL_SIGSET_SIZE)
        mask.sigset[:] = sigset.to_bytes(_KERNEL_SIGSET_SIZE, "little")
        kvm_call(fd, "KVM_SET_SIGNAL_MASK", byref(mask), f"{sigset:#x}")
        self._masked_for = _this_thread.token
