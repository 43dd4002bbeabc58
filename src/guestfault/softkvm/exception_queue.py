"""Exceptions of the guest: how one is raised, and how two combine (``kvm_multiple_exception``).

An exception while another is pending, which is to say during its delivery, combines with it (SDM
volume 3, table 6-5): two contributory ones or a page fault in a page fault make a double fault,
anything serious after that is the triple fault, which KVM reports as KVM_EXIT_SHUTDOWN.
"""

from __future__ import annotations

from guestfault.softkvm.kvm_host import KvmVcpu, Request, kvm_make_request
from guestfault.softkvm.refusal import GuestException
from guestfault.x86.registers import (
    CONTRIBUTORY_VECTORS,
    DF_VECTOR,
    ERROR_CODE_VECTORS,
    PF_VECTOR,
)

__all__ = ["from_intercept", "kvm_queue_exception"]


def from_intercept(vector: int) -> GuestException:
    """The exception that the processor wanted to raise.  Its error code is not to be had: 0."""
    return GuestException(vector, 0 if vector in ERROR_CODE_VECTORS else None)


def kvm_queue_exception(vcpu: KvmVcpu, new: GuestException) -> int:
    """Make an exception pending, combined with one that is, or a triple fault requested: 1."""
    first = vcpu.pending_exception
    if first is not None and not first.instruction_length:
        serious = new.vector == PF_VECTOR or new.vector in CONTRIBUTORY_VECTORS
        if first.vector == DF_VECTOR and serious:
            vcpu.pending_exception = None
            kvm_make_request(vcpu, Request.TRIPLE_FAULT)
            return 1
        if (first.vector == PF_VECTOR and serious) or (
            first.vector in CONTRIBUTORY_VECTORS and new.vector in CONTRIBUTORY_VECTORS
        ):
            new = GuestException(DF_VECTOR, 0, new.address)
    if new.address is not None:
        vcpu.cpu.set_cr2(new.address)
    vcpu.pending_exception = new
    return 1
