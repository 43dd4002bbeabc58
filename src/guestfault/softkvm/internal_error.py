"""The instruction at RIP, and the exit for one that KVM cannot carry out."""

from __future__ import annotations

import iced_x86

from guestfault.softkvm.guest_mmu import read_guest_virt
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.refusal import AccessFailed
from guestfault.uapi import kvm as uapi

__all__ = ["code_at_rip", "decode", "internal_error"]

_MAX_INSTRUCTION = 15


def decode(vcpu: KvmVcpu) -> iced_x86.Instruction:
    """The instruction at RIP; raises :class:`AccessFailed` if its bytes cannot be had."""
    code = code_at_rip(vcpu)
    if not code:
        read_guest_virt(vcpu, vcpu.cpu.linear_rip, 1, fetch=True)
    return iced_x86.Decoder(vcpu.cpu.code_size(), code, ip=vcpu.cpu.rip).decode()


def internal_error(vcpu: KvmVcpu, suberror: int, text: str) -> int:
    """KVM_EXIT_INTERNAL_ERROR; with the bytes at RIP for an instruction that was not emulated.

    ``text`` is left in ``vcpu.last_error``: the kernel would have written it to its log.
    """
    run = vcpu.run
    vcpu.last_error = text
    run.exit_reason = uapi.KVM_EXIT_INTERNAL_ERROR
    if suberror == uapi.KVM_INTERNAL_ERROR_EMULATION:
        code = code_at_rip(vcpu)
        failure = run.emulation_failure
        failure.suberror = suberror
        failure.ndata = 4
        failure.flags = uapi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES if code else 0
        failure.insn_size = len(code)
        failure.insn_bytes[: len(code)] = code
    else:
        run.internal.suberror = suberror
        run.internal.ndata = 0
    return 0


def code_at_rip(vcpu: KvmVcpu) -> bytes:
    """Up to 15 bytes, fewer if the next page cannot be read; empty if this one cannot."""
    linear = vcpu.cpu.linear_rip
    for size in (_MAX_INSTRUCTION, min(_MAX_INSTRUCTION, 0x1000 - (linear & 0xFFF))):
        try:
            return read_guest_virt(vcpu, linear, size, fetch=True)
        except AccessFailed:
            continue
    return b""
