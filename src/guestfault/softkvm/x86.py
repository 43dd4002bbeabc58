"""``KVM_RUN``: the loop of ``arch/x86/kvm/x86.c``.

:func:`kvm_arch_vcpu_ioctl_run` completes what userspace was asked for, and, unless that is all that
userspace wants, hands over to :func:`vcpu_run`, which enters the guest again and again, or sleeps
while it is halted.  Before each entry :func:`vcpu_enter_guest` serves the vCPU's requests, in
Linux's order, and delivers what is pending.  Every handler speaks KVM's convention: 1 resumes the
guest, 0 exits to userspace with ``kvm_run`` filled, a negative errno is what KVM_RUN fails with.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator

from guestfault.softkvm import preempt
from guestfault.softkvm.async_pf_ready import kvm_check_async_pf_completion
from guestfault.softkvm.block import (
    kvm_vcpu_block,
    kvm_vcpu_running,
    vcpu_block,
)
from guestfault.softkvm.efault import forget_annotation, kvm_run_begin, vcpu_run_begin
from guestfault.softkvm.emulate import emulate_intercept, emulate_planted
from guestfault.softkvm.emulator import x86_emulate_instruction
from guestfault.softkvm.events import has_event, inject_event, must_step, step
from guestfault.softkvm.exception_queue import from_intercept, kvm_queue_exception
from guestfault.softkvm.fault_address import refine
from guestfault.softkvm.guest_memfd import kvm_gmem_release_closed
from guestfault.softkvm.internal_error import internal_error
from guestfault.softkvm.kvm_host import KvmVcpu, Request, kvm_check_request
from guestfault.softkvm.memslots import KVM_MEMSLOT_INVALID, KvmMemorySlot, Memslots
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.processor import PRIVATE_PAGE, REFUSED, Stop, StopKind
from guestfault.softkvm.refusal import (
    AccessFailed,
    Emulate,
    Exit,
    GuestException,
    Refusal,
    Retry,
)
from guestfault.softkvm.srcu import srcu_cond_resched
from guestfault.softkvm.vmcb import INTERCEPT_EXCEPTION, VMEXIT_INVALID
from guestfault.uapi import kvm as uapi

__all__ = ["kvm_arch_vcpu_ioctl_run"]


def kvm_arch_vcpu_ioctl_run(vcpu: KvmVcpu) -> int:
    """Finish the last exit, then run; ``immediate_exit`` stops in between.

    That is read once, as KVM_RUN begins (``vcpu->wants_to_run``, since Linux 6.11; before, it was
    read in between).  What comes later is a signal, and sets exit_reason.
    """
    kvm_run_begin(vcpu)
    if vcpu.mp_state == uapi.KVM_MP_STATE_UNINITIALIZED:
        return _wait_for_init(vcpu)
    if vcpu.complete_userspace_io is None and vcpu.emulate_ctxt.mmio_needed:
        # An exit was prepared for an access of KVM's own, and never made.
        vcpu.kvm.warn_on_once("kvm_arch_vcpu_ioctl_run: mmio_needed, and nobody completes it")
    while (complete := vcpu.complete_userspace_io) is not None:
        vcpu.complete_userspace_io = None
        r = _handled(vcpu, complete)
        if r <= 0:
            return r
    if not vcpu.wants_to_run:
        return -errno.EINTR  # exit_reason is left as it was, as in the kernel
    return vcpu_run(vcpu)


def _wait_for_init(vcpu: KvmVcpu) -> int:
    """An application processor sleeps until another starts it: here, until userspace does."""
    if vcpu.wants_to_run:
        kvm_vcpu_block(vcpu)
        if not kvm_check_request(vcpu, Request.SIGNAL):
            return -errno.EAGAIN
        vcpu.run.exit_reason = uapi.KVM_EXIT_INTR
        vcpu.stat.signal_exits += 1
    return -errno.EINTR


def vcpu_run(vcpu: KvmVcpu) -> int:
    """Enter the guest, or sleep while it is halted, until a handler wants userspace."""
    vcpu_run_begin(vcpu)
    if vcpu.kvm.has_gmem:
        kvm_gmem_release_closed(vcpu.kvm)
    _about_to_look_at_requests(vcpu)
    while True:
        # Nothing is ever halted without an APIC.
        running = vcpu.apic is None or kvm_vcpu_running(vcpu)
        r = vcpu_enter_guest(vcpu) if running else vcpu_block(vcpu)
        if r <= 0:
            return r
        _about_to_look_at_requests(vcpu)
        if kvm_check_request(vcpu, Request.SIGNAL):
            vcpu.run.exit_reason = uapi.KVM_EXIT_INTR
            vcpu.stat.signal_exits += 1
            return -errno.EINTR


def _about_to_look_at_requests(vcpu: KvmVcpu) -> None:
    """The point for all looks at them from here to the next point."""
    if preempt.scheduler is not None:
        preemption_point("vcpu_run: look at the requests", vcpu.shared)


def vcpu_enter_guest(vcpu: KvmVcpu) -> int:
    """Serve the requests, deliver what is pending, run the guest once, handle its exit."""
    if vcpu.requests or vcpu.sregs_changed or vcpu.slots_changed():
        r = _serve_requests(vcpu)
        if r is not None:
            return r
    if vcpu.apic is None and vcpu.pending_exception is None:
        return _run_guest(vcpu)
    return _handled(vcpu, lambda: _inject_or_run(vcpu))


def _serve_requests(vcpu: KvmVcpu) -> int | None:
    """The requests, in Linux's order; a result if one of them is not to enter the guest.

    One that prepares an exit leaves at once: no page fault is made on the way out, in which
    ``kvm_run`` could be written again.
    """
    _about_to_look_at_requests(vcpu)
    flush = kvm_check_request(vcpu, Request.TLB_FLUSH)
    if vcpu.slots_changed():
        _map_memslots(vcpu, vcpu.kvm.memslots)
        # Translated code still knows the memory that it was in, and would crash the engine.
        flush = True
    if flush:
        vcpu.forget_walks()
        vcpu.cpu.flush_tlb()
        vcpu.cpu.flush_code()
    if vcpu.sregs_changed:
        vcpu.load_sregs()
    _about_to_look_at_requests(vcpu)
    if not vcpu.requests:
        return None
    if kvm_check_request(vcpu, Request.TRIPLE_FAULT):
        vcpu.run.exit_reason = uapi.KVM_EXIT_SHUTDOWN
        vcpu.emulate_ctxt.mmio_needed = False
        return 0
    if kvm_check_request(vcpu, Request.APF_HALT):
        vcpu.apf.halted = True  # the page is not there: an artificial halt until it is
        return 1
    if kvm_check_request(vcpu, Request.APF_READY):
        kvm_check_async_pf_completion(vcpu)
        _about_to_look_at_requests(vcpu)
    if kvm_check_request(vcpu, Request.EVENT):
        vcpu.stat.req_event += 1
    return None


def _inject_or_run(vcpu: KvmVcpu) -> int:
    """Deliver what is pending, if the guest can take it; else have it run."""
    if has_event(vcpu):
        return _after(vcpu, inject_event(vcpu))
    return _run_guest(vcpu)


def _run_guest(vcpu: KvmVcpu) -> int:
    """Have the processor execute the guest until something needs KVM, and handle that."""
    cpu = vcpu.cpu
    if vcpu.apic is not None and must_step(vcpu):
        stop = step(vcpu)
    else:
        stop = _execute(vcpu, cpu.run if vcpu.system_page is None else cpu.step)
    if stop is REFUSED and vcpu.refused_fetch is not None and _fetched_ahead(vcpu):
        stop = _execute(vcpu, cpu.step)
    vcpu.stat.exits += 1
    if stop is REFUSED:
        refusal = vcpu.refusal
        if type(refusal) is GuestException:
            refusal = refine(vcpu, refusal)
        else:
            vcpu.system_page = None
        return _after(vcpu, refusal)
    # What is granted to the processor's own accesses is for one instruction only.
    vcpu.system_page = None
    if stop.kind in (StopKind.REQUESTED, StopKind.STEPPED):
        return 1
    return _handle_exit(vcpu, stop)


def _execute(vcpu: KvmVcpu, execute: Callable[[], Stop]) -> Stop:
    """Guest code: its accesses are the guest's own, and may be told that a page comes later."""
    vcpu.emulating = vcpu.shadow_passed = False
    try:
        return vcpu.enter_guest(execute)
    finally:
        vcpu.emulating = True


def _fetched_ahead(vcpu: KvmVcpu) -> bool:
    """Whether what was refused is a fetch that the guest has not come to, and may never make.

    The engine translates a block at once, into the next page if the block goes on there.  RIP is on
    the block's first instruction then: that one is executed alone, and what it is refused is real.
    """
    gva = vcpu.refused_fetch
    if gva is None or gva >> 12 == vcpu.cpu.linear_rip >> 12:
        return False
    forget_annotation(vcpu)
    return True


def _handle_exit(vcpu: KvmVcpu, stop: Stop) -> int:
    vcpu.refresh_cpl()
    code = stop.code
    vcpu.exit_code = code if stop.kind is StopKind.INTERCEPT else VMEXIT_INVALID
    match stop.kind:
        case StopKind.PLANTED:
            return _handled(vcpu, lambda: _planted(vcpu))
        case StopKind.INTERCEPT if INTERCEPT_EXCEPTION <= code < INTERCEPT_EXCEPTION + 32:
            exception = from_intercept(code - INTERCEPT_EXCEPTION)
            return _after(vcpu, exception)
        case StopKind.INTERCEPT:
            return _handled(vcpu, lambda: emulate_intercept(vcpu, code))
    return internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_EMULATION, stop.text)


def _planted(vcpu: KvmVcpu) -> int:
    r = emulate_planted(vcpu)
    if r is None:
        vcpu.cpu.unplant()
        return 1
    return r


def _handled(vcpu: KvmVcpu, handler: Callable[[], int]) -> int:
    """Run a handler that accesses guest memory, and deal with an access that fails."""
    try:
        return handler()
    except AccessFailed as failed:
        if isinstance(failed.refusal, Emulate):
            text = f"memory at {failed.refusal.gpa:#x} is not in a slot"
            return internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_EMULATION, text, failed.refusal)
        return _after(vcpu, failed.refusal)


def _after(vcpu: KvmVcpu, refusal: Refusal | None) -> int:
    """What follows from an access that did not go through."""
    if type(refusal) is Exit:
        return refusal.result
    match refusal:
        case GuestException():
            return kvm_queue_exception(vcpu, refusal)
        case Emulate():
            return _handled(vcpu, lambda: x86_emulate_instruction(vcpu, refusal))
        case Retry():
            srcu_cond_resched(vcpu, "mmu", lambda: _has_settled(vcpu))
    return 1


def _has_settled(vcpu: KvmVcpu) -> bool:
    """Whether a fault that must be tried again may end otherwise now, or the vCPU is wanted."""
    if vcpu.requests:
        return True
    kvm = vcpu.kvm
    if kvm.second_stage.mmu_invalidate_in_progress:
        return False
    return not any(slot.flags & KVM_MEMSLOT_INVALID for slot in kvm.memslots.slots)


def _map_memslots(vcpu: KvmVcpu, memslots: Memslots) -> None:
    """Make the processor's memory the VM's slots."""

    def regions(slots: Memslots) -> set[tuple[int, int, int]]:
        return {region for slot in slots.slots for region in _regions(slot)}

    old, new = regions(vcpu.mapped_memslots), regions(memslots)
    for gpa, size, _ in old - new:
        vcpu.cpu.unmap_ram(gpa, size)
    for gpa, size, hva in new - old:
        vcpu.cpu.map_ram(gpa, size, hva)
    vcpu.mapped_memslots = memslots


def _regions(slot: KvmMemorySlot) -> Iterator[tuple[int, int, int]]:
    """(address, size, host address) of a slot's memory, as the processor is to have it."""
    gpa, size, gmem = slot.base_gfn << 12, slot.npages << 12, slot.gmem
    if gmem is None:
        yield gpa, size, slot.userspace_addr
        return
    shared = gmem.address if slot.gmem_only else slot.userspace_addr
    if shared:  # where all is private, there need be no address
        yield gpa, size, shared
    yield PRIVATE_PAGE | gpa, size, gmem.address
