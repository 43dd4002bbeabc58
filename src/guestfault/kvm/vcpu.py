"""A virtual CPU of ``/dev/kvm``: entering the guest, and the state of its processor.

:meth:`KvmVcpu.run` is the ioctl and nothing else: it returns 0 or a negative errno, and what it
means is :mod:`guestfault.fault.outcome`'s to say.  It holds no lock of Python's while the guest
runs, so vCPUs on several threads run at the same time, and other threads kick them out
(:mod:`guestfault.kvm.kick`).
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Callable, Iterable, Mapping
from ctypes import Structure, byref
from typing import Any

from guestfault.errors import KvmError
from guestfault.kvm.call import kvm_call
from guestfault.kvm.kick import KickSwitch
from guestfault.kvm.run_area import RunArea
from guestfault.linux.ioctl import ioctl
from guestfault.uapi import kvm as uapi

__all__ = ["KvmVcpu"]


def _kvm_run(fd: int) -> int:
    return ioctl(fd, uapi.KVM_RUN, 0)


class KvmVcpu:
    """A virtual CPU; made by :meth:`~guestfault.kvm.vm.KvmVm.create_vcpu`.

    Owns ``fd``, once constructed.  May be run by one thread now and by another later.
    """

    def __init__(self, fd: int, vcpu_id: int, run_area_size: int) -> None:
        self._vcpu_id = vcpu_id
        self._area = RunArea(fd, run_area_size)
        self._kicks = KickSwitch(self._area)
        self._fd = fd

    @property
    def vcpu_id(self) -> int:
        """The id it was created with."""
        return self._vcpu_id

    @property
    def kvm_run(self) -> uapi.kvm_run:
        """The page shared with KVM (``struct kvm_run``), live; a copy once the vCPU is closed."""
        return self._area.kvm_run

    @property
    def run_area(self) -> memoryview:
        """The whole shared area; the data of a ``KVM_EXIT_IO`` is at ``kvm_run.io.data_offset``."""
        return self._area.view

    def run(self) -> int:
        """``KVM_RUN``: enter the guest; 0 or a negative errno.  Blocks without holding the GIL.

        -EBADF once the vCPU is closed.
        """
        return self.run_by(_kvm_run)

    def run_by(self, issue: Callable[[int], int]) -> int:
        """:meth:`run`, by somebody who issues ``KVM_RUN`` on the descriptor that he is given.

        He may issue it several times, on this thread and without the GIL.  He ends with the first
        result that is -EINTR, at the latest, and returns what he ended with.
        """
        if self._fd < 0:
            return -errno.EBADF
        ret = 0
        self._kicks.enter(self._fd)
        try:
            ret = issue(self._fd)
        finally:
            self._kicks.leave(ret)
        return ret

    def kick(self) -> None:
        """From any thread: make a :meth:`run` in progress, or else the next one, return -EINTR.

        The :meth:`run` that returns it has cleared ``kvm_run.immediate_exit``.  One that the caller
        set without a kick stays until the caller clears it, as in the kernel.
        """
        self._kicks.kick()

    def set_interrupting_signals(self, signals: Iterable[signal.Signals]) -> None:
        """``KVM_SET_SIGNAL_MASK``, at the next :meth:`run`: what is open in it, come what may."""
        self._kicks.open(signals)

    def get_regs(self) -> uapi.kvm_regs:
        """``KVM_GET_REGS``, a copy."""
        regs = uapi.kvm_regs()
        self._call("KVM_GET_REGS", regs)
        return regs

    def set_regs(self, regs: uapi.kvm_regs) -> None:
        """``KVM_SET_REGS``."""
        self._call("KVM_SET_REGS", regs)

    def get_sregs(self) -> uapi.kvm_sregs:
        """``KVM_GET_SREGS``, a copy."""
        sregs = uapi.kvm_sregs()
        self._call("KVM_GET_SREGS", sregs)
        return sregs

    def set_sregs(self, sregs: uapi.kvm_sregs) -> None:
        """``KVM_SET_SREGS``; raises :class:`~guestfault.errors.KvmError` (EINVAL) on bad state."""
        state = f"cr0 {sregs.cr0:#x}, cr4 {sregs.cr4:#x}, efer {sregs.efer:#x}"
        self._call("KVM_SET_SREGS", sregs, state)

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """``KVM_GET_MSRS``: see :meth:`guestfault.kvm.protocols.Vcpu.get_msrs`."""
        msrs = self._msrs("KVM_GET_MSRS", dict.fromkeys(indices, 0))
        return {entry.index: entry.data for entry in msrs.entries}

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """``KVM_SET_MSRS``: see :meth:`guestfault.kvm.protocols.Vcpu.set_msrs`."""
        self._msrs("KVM_SET_MSRS", values)

    def _msrs(self, name: str, values: Mapping[int, int]) -> Any:
        msrs = uapi.flexible(uapi.kvm_msrs, len(values))()
        msrs.nmsrs = len(values)
        for entry, (index, value) in zip(msrs.entries, values.items(), strict=True):
            entry.index, entry.data = index, value
        # It does not fail at one that it refuses: it stops there, and says how far it came.
        done = kvm_call(self._fd, name, byref(msrs), f"vCPU {self._vcpu_id}")
        if done < len(values):
            refused = msrs.entries[done]
            raise KvmError(name, errno.EINVAL, f"MSR {refused.index:#x}")
        return msrs

    def get_mp_state(self) -> int:
        """``KVM_GET_MP_STATE``: a ``KVM_MP_STATE_*``."""
        state = uapi.kvm_mp_state()
        self._call("KVM_GET_MP_STATE", state)
        return int(state.mp_state)

    def set_mp_state(self, mp_state: int) -> None:
        """``KVM_SET_MP_STATE``: see :meth:`guestfault.kvm.protocols.Vcpu.set_mp_state`."""
        self._call("KVM_SET_MP_STATE", uapi.kvm_mp_state(mp_state), f"state {mp_state}")

    def translate(self, gva: int) -> uapi.kvm_translation:
        """``KVM_TRANSLATE``: walk the guest's page tables for a gva, without faulting."""
        translation = uapi.kvm_translation(linear_address=gva)
        self._call("KVM_TRANSLATE", translation, f"gva {gva:#x}")
        return translation

    def pre_fault(self, gpa: int, size: int) -> None:
        """``KVM_PRE_FAULT_MEMORY`` (Linux 6.11): map ``[gpa, gpa + size)`` before the guest asks.

        Raises :class:`~guestfault.errors.KvmError`: ENOENT where there is no slot, EOPNOTSUPP
        without two-dimensional paging, EFAULT or EHWPOISON where the memory cannot be had.
        """
        request = uapi.kvm_pre_fault_memory(gpa=gpa, size=size)
        while request.size:  # the kernel moves gpa and size past what it has done
            detail = f"[{request.gpa:#x}, {gpa + size:#x})"
            self._call("KVM_PRE_FAULT_MEMORY", request, detail)

    def pre_fault_once(self, request: uapi.kvm_pre_fault_memory) -> int:
        """``KVM_PRE_FAULT_MEMORY``, the bare ioctl: 0 or a negative errno.

        It moves the request's ``gpa`` and ``size`` past what it has done, also when it fails.
        """
        return ioctl(self._fd, uapi.KVM_PRE_FAULT_MEMORY, byref(request))

    def close(self) -> None:
        """Release the vCPU.  Not while a thread is inside :meth:`run`.  Again is harmless."""
        self._area.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _call(self, name: str, arg: Structure, detail: str = "") -> None:
        where = f"vCPU {self._vcpu_id}"
        kvm_call(self._fd, name, byref(arg), f"{where}, {detail}" if detail else where)
