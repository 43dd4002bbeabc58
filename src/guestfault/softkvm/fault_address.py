"""What the TLB does not say of an access that it missed: its very address, and on whose behalf.

Unicorn asks for a page.  CR2 must hold the address to the byte, and the processor's own accesses to
descriptor tables are a supervisor's at any privilege level.  Both matter only when the guest is to
get a page fault, so they are worked out then, from the instruction that was stopped
(:mod:`guestfault.x86.accesses`).  The address is also a part of what userspace is told when KVM
cannot carry that instruction out.
"""

from __future__ import annotations

from dataclasses import replace

from guestfault.softkvm.internal_error import code_at_rip
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.refusal import Emulate, GuestException, Refusal, Retry
from guestfault.uapi import kvm as uapi
from guestfault.x86.accesses import AccessKind, MemoryAccess, accesses
from guestfault.x86.registers import (
    PF_VECTOR,
    PFERR_GUEST_PAGE_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)
from guestfault.x86.state import CpuState

__all__ = ["exact_fault", "refine"]

_PAGE, _OFFSET = -4096, 4095


def refine(vcpu: KvmVcpu, refusal: Refusal) -> Refusal:
    """The refusal of an access by the instruction at RIP, with what it says made exact.

    A page fault of a supervisor's access that was taken for a user's becomes a :class:`Retry`, for
    which the page is known to be accessed so.
    """
    system_page, vcpu.system_page = vcpu.system_page, None
    if not isinstance(refusal, GuestException) or refusal.vector != PF_VECTOR:
        return refusal
    page, error_code = refusal.address or 0, refusal.error_code or 0
    candidates = _in_page(vcpu, page, code_at_rip(vcpu))
    if not candidates:
        return refusal
    is_write = bool(error_code & PFERR_WRITE_MASK)
    access, address = next(
        (found for found in candidates if found[0].kind.writes is is_write),
        candidates[0],
    )
    if access.system and error_code & PFERR_USER_MASK and system_page != page:
        vcpu.system_page = page
        return Retry()
    if access.kind is AccessKind.READ_WRITE:
        error_code |= PFERR_WRITE_MASK  # which the engine reads first, and a processor does not
    return replace(refusal, address=address, error_code=error_code)


def exact_fault(vcpu: KvmVcpu) -> Emulate | None:
    """The fault for which the instruction is emulated, its address made exact; ``None`` for none.

    That of an access to a page table is so already.
    """
    ctxt = vcpu.emulate_ctxt
    fault = ctxt.fault
    if fault is None or fault.address & _OFFSET or fault.error_code & PFERR_GUEST_PAGE_MASK:
        return fault
    page = fault.address if ctxt.fault_page is None else ctxt.fault_page
    if fault.kind is AccessKind.FETCH:
        found = [ctxt.linear_rip] if ctxt.linear_rip & _PAGE == page else []
    else:
        writes = fault.kind is AccessKind.WRITE
        found = [
            at for access, at in _in_page(vcpu, page, ctxt.fetched) if access.kind.writes is writes
        ]
    return replace(fault, address=fault.address | found[0] & _OFFSET) if found else fault


def _in_page(vcpu: KvmVcpu, page: int, code: bytes) -> list[tuple[MemoryAccess, int]]:
    """The accesses of the instruction to a page, and where each begins in it."""
    regs = uapi.kvm_regs(**vcpu.cpu.named_gprs())
    return [
        (access, part.address)
        for access in accesses(code, CpuState.from_kvm(regs, vcpu.sync_sregs()))
        for part in access.pages()
        if part.address & _PAGE == page
    ]
