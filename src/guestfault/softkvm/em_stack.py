"""What the emulator pushes: ``em_push`` and ``em_pusha`` (arch/x86/kvm/emulate.c).

Most instructions access memory in an order that is theirs, and the processor keeps to it.  PUSHA
makes eight writes, and which of them comes last decides what userspace gets to see: KVM pushes AX
first and DI last, from the top of the frame downwards.
"""

from __future__ import annotations

from guestfault.softkvm.emulate_ctxt import X86Emul
from guestfault.softkvm.emulated_access import emulator_read_write
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.refusal import GuestException
from guestfault.x86.registers import SS_VECTOR
from guestfault.x86.segments import Segment

__all__ = ["em_push", "em_pusha"]

_ORDER = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")


def em_push(vcpu: KvmVcpu, ss: Segment, rsp: int, value: int, size: int) -> tuple[X86Emul, int]:
    """Push ``size`` bytes of a value outside 64-bit mode: how that ended, and the new RSP."""
    mask = 0xFFFFFFFF if ss.db else 0xFFFF
    offset = (rsp - size) & mask
    if not ss.holds(offset, size):
        vcpu.emulate_ctxt.exception = GuestException(SS_VECTOR, 0)
        return X86Emul.PROPAGATE_FAULT, rsp
    data = bytearray((value & (1 << 8 * size) - 1).to_bytes(size, "little"))
    rc = emulator_read_write(vcpu, ss.base + offset & 0xFFFFFFFF, data, write=True)
    return rc, rsp & ~mask | offset


def em_pusha(vcpu: KvmVcpu, size: int) -> X86Emul:
    """PUSHA or PUSHAD: eight pushes, and RSP as it was before them."""
    ctxt, regs = vcpu.emulate_ctxt, vcpu.cpu.named_gprs()
    assert ctxt.insn is not None
    ss, rsp = Segment.from_kvm(vcpu.sync_sregs().ss), regs["rsp"]
    for name in _ORDER:
        rc, rsp = em_push(vcpu, ss, rsp, regs[name], size)
        if rc is not X86Emul.CONTINUE:
            return rc
    mask = (1 << ctxt.code_size) - 1
    ctxt.writeback.update(rsp=rsp, rip=(ctxt.eip + ctxt.insn.len) & mask)
    return X86Emul.CONTINUE
