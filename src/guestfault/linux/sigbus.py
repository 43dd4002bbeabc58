"""The ``SIGBUS`` that tells of broken memory, taken by the thread that it is sent to.

When an access meets a page whose memory has failed (or was declared so: ``MADV_HWPOISON``,
``UFFDIO_POISON``), the kernel sends its thread ``SIGBUS`` with the code ``BUS_MCEERR_AR`` and the
page's address.  Nobody who has not prepared for it survives that.  A handler of Python's is no
preparation: it runs in the main thread whichever thread was meant, and is not told the address.

So a thread that can do something about it **blocks** the signal (:class:`SigbusHeld`) and **asks**
for it (:func:`take_sigbus`), which is ``sigtimedwait(2)`` without waiting.  That serves a signal
that is *sent*, as KVM does on behalf of a guest (``kvm_send_hwpoison_signal``,
arch/x86/kvm/mmu/mmu.c), and it is for KVM_RUN to come back while one is pending:
:meth:`~guestfault.kvm.protocols.Vcpu.set_interrupting_signals`.

It does not serve an instruction of the process's own, be it on a page that is broken or on one past
the end of its file (``BUS_ADRERR``), nor a thread's own ``madvise(MADV_HWPOISON)``.  Such a signal
is *forced*: it cannot be put off, and where it is blocked the kernel ends the process
(``force_sig_info_to_task``, kernel/signal.c), as it would have without a handler.  What copies
guest memory on the host's side dies of it as before.  The signal for memory that the guest itself
found broken, by a machine check, is forced too, but inside KVM_RUN, where it is open.

``BUS_MCEERR_AO`` says that memory broke which nobody has accessed.  The kernel sends it to a thread
that has asked for it (``PR_MCE_KILL_EARLY``), which none of ours does, and with
``vm.memory_failure_early_kill`` to every process's main thread, where it ends a process that does
not expect it.  Where a thread that holds the signal is sent one, it is taken like the other and
says so.
"""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import threading
from dataclasses import dataclass
from typing import Final, Self

from guestfault.linux.ioctl import check, syscall
from guestfault.uapi import signal as uapi

__all__ = ["Sigbus", "SigbusHeld", "send_sigbus", "take_sigbus"]

_SIGBUS: Final = {signal.SIGBUS}
_OF_BROKEN_MEMORY: Final = (uapi.BUS_MCEERR_AR, uapi.BUS_MCEERR_AO)
_KERNEL_SIGSET_SIZE: Final = 8  # bytes; not glibc's 128
_the_set = ctypes.c_uint64(1 << (signal.SIGBUS - 1))
_at_once = (ctypes.c_int64 * 2)()  # struct timespec


@dataclass(frozen=True, slots=True)
class Sigbus:
    """The ``2**lsb`` bytes of this process's memory around ``address`` are broken.

    ``action_required``: this thread has just accessed them, and will not get past it.
    """

    address: int
    lsb: int
    action_required: bool


class SigbusHeld:
    """``with SigbusHeld():`` the calling thread's SIGBUS stays pending, for :func:`take_sigbus`.

    At the end the thread's mask is as it was.  What is pending and was not taken by then, is
    dropped if it tells of broken memory: whoever needs that memory is told again.
    """

    def __enter__(self) -> Self:
        self._was_blocked = signal.SIGBUS in signal.pthread_sigmask(signal.SIG_BLOCK, _SIGBUS)
        return self

    def __exit__(self, *_: object) -> None:
        while take_sigbus() is not None:
            pass
        if not self._was_blocked:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGBUS)


def take_sigbus() -> Sigbus | None:
    """Take a pending SIGBUS of broken memory from this thread, which must hold it; never waits.

    One of another sort, which somebody sent by ``kill(2)``, is not for us: it is let go, and does
    to the process what it would have done.
    """
    info = uapi.siginfo()
    while True:
        number = syscall(
            uapi.SYS_rt_sigtimedwait,
            ctypes.addressof(_the_set),
            ctypes.addressof(info),
            ctypes.addressof(_at_once),
            _KERNEL_SIGSET_SIZE,
        )
        if number == -errno.EINTR:
            continue
        if number < 0:  # EAGAIN: none is pending
            return None
        if info.si_code in _OF_BROKEN_MEMORY:
            required = info.si_code == uapi.BUS_MCEERR_AR
            return Sigbus(info.si_addr or 0, info.si_addr_lsb, required)
        _queue(info)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGBUS)  # here it is delivered
        signal.pthread_sigmask(signal.SIG_BLOCK, _SIGBUS)


def send_sigbus(address: int, lsb: int, *, action_required: bool = True) -> None:
    """Send this thread what the kernel sends for broken memory (``send_sig_mceerr``).

    For a KVM in software.  A thread that does not hold the signal has it delivered at once.
    """
    info = uapi.siginfo()
    info.si_code = uapi.BUS_MCEERR_AR if action_required else uapi.BUS_MCEERR_AO
    info.si_addr, info.si_addr_lsb = address, lsb
    _queue(info)


def _queue(info: uapi.siginfo) -> None:
    """To itself a thread may send a signal with any code, the kernel's among them."""
    info.si_signo = signal.SIGBUS
    where = os.getpid(), threading.get_native_id(), int(signal.SIGBUS)
    check(
        syscall(uapi.SYS_rt_tgsigqueueinfo, *where, ctypes.addressof(info)),
        "rt_tgsigqueueinfo",
        "SIGBUS",
    )
