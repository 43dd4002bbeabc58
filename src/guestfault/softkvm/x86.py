"""``KVM_RUN``: the loop of ``arch/x86/kvm/x86.c``.

:func:`kvm_arch_vcpu_ioctl_run` completes what userspace was asked for, looks at ``immediate_exit``,
and hands over to :func:`vcpu_run`, which enters the guest again and again.  Every handler speaks
KVM's convention: 1 resumes the guest, 0 exits to userspace with ``kvm_run`` filled, a negative
errno is what KVM_RUN fails with.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Callable

from guestfault.softkvm import exceptions
from guestfault.softkvm.emulate import emulate_intercept, emulate_planted
from guestfault.softkvm.fault_address import refine
from guestfault.softkvm.internal_error import internal_error
from guestfault.softkvm.kvm_host import KvmVcpu, Request, kvm_check_request
from guestfault.softkvm.memslots import Memslots
from guestfault.softkvm.mmio import DeviceAccesses, emulate_device_access
from guestfault.softkvm.processor import REFUSED, Stop, StopKind
from guestfault.softkvm.refusal import (
    AccessFailed,
    Emulate,
    Exit,
    GuestException,
    Refusal,
    Retry,
)
from guestfault.softkvm.vmcb import INTERCEPT_EXCEPTION
from guestfault.uapi import kvm as uapi
from guestfault.x86.paging import AccessKind

__all__ = ["kvm_arch_vcpu_ioctl_run"]


def kvm_arch_vcpu_ioctl_run(vcpu: KvmVcpu, devices: DeviceAccesses) -> int:
    """Finish the last exit, then run; ``immediate_exit`` stops in between."""
    while (complete := vcpu.complete_userspace_io) is not None:
        vcpu.complete_userspace_io = None
        r = _handled(vcpu, devices, complete)
        if r <= 0:
            return r
    if vcpu.run.immediate_exit:
        kvm_check_request(vcpu, Request.SIGNAL)
        return -errno.EINTR  # exit_reason is left as it was, as in the kernel
    return vcpu_run(vcpu, devices)


def vcpu_run(vcpu: KvmVcpu, devices: DeviceAccesses) -> int:
    """Enter the guest until a handler wants userspace."""
    if vcpu.kvm.dialect.resets_exit_reason:
        vcpu.run.exit_reason = uapi.KVM_EXIT_UNKNOWN
    while True:
        r = vcpu_enter_guest(vcpu, devices)
        if r <= 0:
            return r
        if kvm_check_request(vcpu, Request.SIGNAL):
            vcpu.run.exit_reason = uapi.KVM_EXIT_INTR
            return -errno.EINTR


def vcpu_enter_guest(vcpu: KvmVcpu, devices: DeviceAccesses) -> int:
    """Serve the requests, deliver what is pending, run the guest once, handle its exit."""
    cpu = vcpu.cpu
    flush = kvm_check_request(vcpu, Request.TLB_FLUSH)
    if vcpu.mapped_memslots is not vcpu.kvm.memslots:
        _map_memslots(vcpu, vcpu.kvm.memslots)
        # Translated code still knows the memory that it was in, and would crash the engine.
        flush = True
    if flush:
        vcpu.forget_walks()
        cpu.flush_tlb()
        cpu.flush_code()
    if vcpu.sregs_changed:
        vcpu.load_sregs()
    if vcpu.pending_exception is not None:
        vcpu.refresh_cpl()
        return _after(vcpu, devices, exceptions.deliver(vcpu))
    if vcpu.system_page is None:
        stop = vcpu.enter_guest(cpu.run)
    else:
        # What is granted to the processor's own accesses is for one instruction only.
        stop = vcpu.enter_guest(cpu.step)
        if stop is not REFUSED:
            vcpu.system_page = None
    if stop is REFUSED and _fetched_ahead(vcpu):
        stop = vcpu.enter_guest(cpu.step)
    vcpu.stat.exits += 1
    if stop is REFUSED:
        return _after(vcpu, devices, refine(vcpu, vcpu.refusal))
    if stop.kind in (StopKind.REQUESTED, StopKind.STEPPED):
        return 1
    # The guest has got past whatever instruction was waiting for a device's answer.
    devices.forget()
    return _handle_exit(vcpu, devices, stop)


def _fetched_ahead(vcpu: KvmVcpu) -> bool:
    """Whether what was refused is a fetch that the guest has not come to, and may never make.

    The engine translates a block at once, into the next page if the block goes on there.  RIP is on
    the block's first instruction then: that one is executed alone, and what it is refused is real.
    """
    gva = vcpu.refused_fetch
    if gva is None or gva >> 12 == vcpu.cpu.linear_rip >> 12:
        return False
    vcpu.run.exit_reason = uapi.KVM_EXIT_UNKNOWN  # of an annotation that nobody is to see
    return True


def _handle_exit(vcpu: KvmVcpu, devices: DeviceAccesses, stop: Stop) -> int:
    vcpu.refresh_cpl()
    code = stop.code
    match stop.kind:
        case StopKind.PLANTED:
            return _handled(vcpu, devices, lambda: _planted(vcpu))
        case StopKind.INTERCEPT if INTERCEPT_EXCEPTION <= code < INTERCEPT_EXCEPTION + 32:
            exception = exceptions.from_intercept(code - INTERCEPT_EXCEPTION)
            return _after(vcpu, devices, exception)
        case StopKind.INTERCEPT:
            return _handled(vcpu, devices, lambda: emulate_intercept(vcpu, code))
    return internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_EMULATION, stop.text)


def _planted(vcpu: KvmVcpu) -> int:
    r = emulate_planted(vcpu)
    if r is None:
        vcpu.cpu.unplant()
        return 1
    return r


def _handled(vcpu: KvmVcpu, devices: DeviceAccesses, handler: Callable[[], int]) -> int:
    """Run a handler that accesses guest memory, and deal with an access that fails."""
    try:
        return handler()
    except AccessFailed as failed:
        if isinstance(failed.refusal, Emulate):
            text = f"memory at {failed.refusal.gpa:#x} is not in a slot"
            return internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_EMULATION, text)
        return _after(vcpu, devices, failed.refusal)


def _after(vcpu: KvmVcpu, devices: DeviceAccesses, refusal: Refusal | None) -> int:
    """What follows from an access that did not go through."""
    match refusal:
        case Exit(result):
            return result
        case GuestException():
            devices.forget()  # the instruction will be executed anew, if at all
            return exceptions.queue(vcpu, refusal)
        case Emulate(gpa, AccessKind.FETCH):
            text = f"instruction fetch from {gpa:#x}, where no memory slot is"
            return internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_EMULATION, text)
        case Emulate():
            return _handled(vcpu, devices, lambda: emulate_device_access(vcpu, devices))
        case Retry():
            time.sleep(0)  # cond_resched: let them finish what we must wait for
    return 1


def _map_memslots(vcpu: KvmVcpu, memslots: Memslots) -> None:
    """Make the processor's memory the VM's slots."""

    def regions(slots: Memslots) -> set[tuple[int, int, int]]:
        return {(s.base_gfn << 12, s.npages << 12, s.userspace_addr) for s in slots.slots}

    old, new = regions(vcpu.mapped_memslots), regions(memslots)
    for gpa, size, _ in old - new:
        vcpu.cpu.unmap_ram(gpa, size)
    for gpa, size, hva in new - old:
        vcpu.cpu.map_ram(gpa, size, hva)
    vcpu.mapped_memslots = memslots
