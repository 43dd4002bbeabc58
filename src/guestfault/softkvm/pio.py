"""Port instructions at which the processor stops: ``kvm_fast_pio`` (arch/x86/kvm/x86.c).

IN and OUT touch no memory: the exit is made, and RIP moves when userspace has done its part.  INS
and OUTS are the emulator's (:mod:`guestfault.softkvm.em_io`).  Before either the processor looks
whether the guest may use the port at all.
"""

from __future__ import annotations

import iced_x86
from iced_x86 import Mnemonic

from guestfault.softkvm.em_io import STRING_IO, emulator_io_permitted, exit_io, finish_in, port_of
from guestfault.softkvm.emulator import x86_emulate_instruction
from guestfault.softkvm.guest_mmu import read_guest_virt
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.refusal import AccessFailed, GuestException
from guestfault.x86.registers import GP_VECTOR

__all__ = ["kvm_fast_pio", "string_io"]


def kvm_fast_pio(vcpu: KvmVcpu, insn: iced_x86.Instruction) -> int:
    """IN or OUT: KVM_EXIT_IO."""
    is_in = insn.mnemonic == Mnemonic.IN
    port, size = port_of(vcpu, insn)
    _check_port(vcpu, port, size)
    if is_in:
        exit_io(vcpu, port, size, 1, None)
    else:
        low = vcpu.cpu.get("rax") & (1 << 8 * size) - 1
        exit_io(vcpu, port, size, 1, low.to_bytes(size, "little"))
    linear_rip = vcpu.cpu.linear_rip

    def complete() -> int:
        # Userspace may have moved RIP elsewhere: complete_fast_pio_out() looks, too.
        if vcpu.cpu.linear_rip == linear_rip:
            if is_in:
                vcpu.cpu.set("rax", finish_in(vcpu, size))
            vcpu.cpu.skip(insn.len)
        return 1

    vcpu.complete_userspace_io = complete
    return 0


def string_io(vcpu: KvmVcpu, insn: iced_x86.Instruction) -> int:
    """INS or OUTS: what the processor checks, then the emulator."""
    _check_port(vcpu, vcpu.cpu.get("rdx") & 0xFFFF, STRING_IO[insn.mnemonic])
    return x86_emulate_instruction(vcpu)


def _check_port(vcpu: KvmVcpu, port: int, size: int) -> None:
    """The processor's own check, before it asks KVM; raises :class:`AccessFailed`."""

    def read(linear: int, length: int) -> bytes:
        return read_guest_virt(vcpu, linear, length, implicit=True)

    if not emulator_io_permitted(vcpu, port, size, read):
        raise AccessFailed(GuestException(GP_VECTOR, 0))
