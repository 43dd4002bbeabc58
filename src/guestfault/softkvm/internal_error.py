"""The instruction at RIP, and the exit for what KVM cannot carry out.

KVM_EXIT_INTERNAL_ERROR comes with words whose number is in ``ndata``: the instruction's bytes, if
there are some, and the processor's own account of its exit (:class:`ExitInfo`), in an order that
depends on the suberror.  What the processor could have said is put together here: it is SVM's,
whose guest mode the engine runs in.
"""

from __future__ import annotations

from typing import NamedTuple

import iced_x86

from guestfault.softkvm.guest_mmu import read_guest_virt
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.refusal import AccessFailed, Emulate
from guestfault.softkvm.vmcb import INTERCEPT_EXCEPTION, VMEXIT_NPF
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import PF_VECTOR, PFERR_GUEST_FINAL_MASK, PFERR_GUEST_PAGE_MASK

__all__ = [
    "ExitInfo",
    "code_at_rip",
    "decode",
    "exit_info",
    "internal_error",
    "kvm_prepare_event_vectoring_exit",
    "prepare_emulation_failure_exit",
]

_MAX_INSTRUCTION = 15
_NOP = b"\x90"
_INVALID_GPA = 2**64 - 1
_CPU = 0
"""The processor of the host that was left last: here is none, and so each run is like the other."""


class ExitInfo(NamedTuple):
    """``svm_get_exit_info``: EXITCODE, EXITINFO1, EXITINFO2, EXITINTINFO and its error code."""

    reason: int
    info1: int = 0
    info2: int = 0
    intr_info: int = 0
    error_code: int = 0


def decode(vcpu: KvmVcpu) -> iced_x86.Instruction:
    """The instruction at RIP; raises :class:`AccessFailed` if its bytes cannot be had."""
    code = code_at_rip(vcpu)
    if not code:
        read_guest_virt(vcpu, vcpu.cpu.linear_rip, 1, fetch=True)
    return iced_x86.Decoder(vcpu.cpu.code_size(), code, ip=vcpu.cpu.rip).decode()


def exit_info(vcpu: KvmVcpu, fault: Emulate | None) -> ExitInfo:
    """What the processor says of its last exit, which was this fault if one is given."""
    if fault is None:
        return ExitInfo(vcpu.exit_code)
    if not vcpu.kvm.tdp_enabled:
        return ExitInfo(INTERCEPT_EXCEPTION + PF_VECTOR, fault.error_code, fault.address)
    code = fault.error_code
    if not code & PFERR_GUEST_PAGE_MASK:
        code |= PFERR_GUEST_FINAL_MASK  # it is one or the other, and so ours have only the first
    return ExitInfo(VMEXIT_NPF, code, fault.address)


def internal_error(vcpu: KvmVcpu, suberror: int, text: str, fault: Emulate | None = None) -> int:
    """KVM_EXIT_INTERNAL_ERROR; with the bytes at RIP for an instruction that was not emulated.

    ``fault`` is what the processor came to KVM with, if that was one.  ``text`` is left in
    ``vcpu.last_error``: the kernel would have written it to its log.
    """
    vcpu.last_error = text
    if suberror == uapi.KVM_INTERNAL_ERROR_EMULATION:
        prepare_emulation_failure_exit(vcpu, code_at_rip(vcpu), exit_info(vcpu, fault))
    else:
        kvm_prepare_event_vectoring_exit(vcpu, exit_info(vcpu, fault), fault)
    return 0


def prepare_emulation_failure_exit(vcpu: KvmVcpu, code: bytes, info: ExitInfo) -> None:
    """Fill ``kvm_run`` for an instruction of which ``code`` was fetched."""
    run = vcpu.run
    run.exit_reason = uapi.KVM_EXIT_INTERNAL_ERROR
    failure, start = run.emulation_failure, 1
    failure.suberror, failure.flags = uapi.KVM_INTERNAL_ERROR_EMULATION, 0
    if code:
        failure.flags = uapi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES
        failure.insn_size = len(code)
        failure.insn_bytes[:] = code.ljust(_MAX_INSTRUCTION, _NOP)
        start = 3
    failure.ndata = start + len(info)
    run.internal.data[start : start + len(info)] = info


def kvm_prepare_event_vectoring_exit(vcpu: KvmVcpu, info: ExitInfo, fault: Emulate | None) -> None:
    """Fill it for an event whose delivery met no memory (suberror DELIVERY_EV)."""
    run, gpa = vcpu.run, _INVALID_GPA if fault is None else fault.address
    run.exit_reason = uapi.KVM_EXIT_INTERNAL_ERROR
    run.internal.suberror = uapi.KVM_INTERNAL_ERROR_DELIVERY_EV
    words = info.info2, info.reason, info.info1, gpa, _CPU
    run.internal.ndata = len(words)
    run.internal.data[: len(words)] = words


def code_at_rip(vcpu: KvmVcpu) -> bytes:
    """Up to 15 bytes, fewer if the next page cannot be read; empty if this one cannot."""
    linear = vcpu.cpu.linear_rip
    for size in (_MAX_INSTRUCTION, min(_MAX_INSTRUCTION, 0x1000 - (linear & 0xFFF))):
        try:
            return read_guest_virt(vcpu, linear, size, fetch=True)
        except AccessFailed:
            continue
    return b""
