"""Instructions that KVM performs for the guest: port I/O, HLT, MSRs, control registers, INT n.

Each is decoded at RIP, as KVM's emulator does, and either done here or handed to userspace.  Memory
they touch goes through :mod:`guestfault.softkvm.guest_mmu`, so a failed access is the
same -EFAULT as any other.  An instruction that is not known here is KVM_EXIT_INTERNAL_ERROR with
the bytes that could not be emulated; it is never skipped.
"""

from __future__ import annotations

from collections.abc import Callable

import iced_x86
from iced_x86 import Mnemonic, OpKind, Register

from guestfault.softkvm.guest_mmu import probe_guest_virt, read_guest_virt, write_guest_virt
from guestfault.softkvm.internal_error import decode, internal_error
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.msr import read_msr, write_msr
from guestfault.softkvm.refusal import AccessFailed, GuestException
from guestfault.softkvm.vmcb import SvmExit
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import (
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
    GP_VECTOR,
    UD_VECTOR,
    X86_EFLAGS_DF,
    X86_EFLAGS_IOPL,
    X86_EFLAGS_IOPL_BIT,
    X86_EFLAGS_VM,
)

__all__ = ["PIO_PAGE_OFFSET", "emulate_intercept", "emulate_planted"]

PIO_PAGE_OFFSET = uapi.KVM_PIO_PAGE_OFFSET * 4096
_U64 = 2**64 - 1


# -- port I/O ------------------------------------------------------------------------------------

_SIZES = {Register.AL: 1, Register.AX: 2, Register.EAX: 4}
_IN_STRING = {Mnemonic.INSB: 1, Mnemonic.INSW: 2, Mnemonic.INSD: 4}
_OUT_STRING = {Mnemonic.OUTSB: 1, Mnemonic.OUTSW: 2, Mnemonic.OUTSD: 4}


def emulate_planted(vcpu: KvmVcpu) -> int | None:
    """One of the instructions that :mod:`guestfault.softkvm.planted` stops on.

    ``None`` if there is another instruction now than the one on which the stop was planted.
    """
    insn = decode(vcpu)
    m = insn.mnemonic
    if m in (Mnemonic.SYSCALL, Mnemonic.SYSENTER):
        text = "SYSCALL and SYSENTER are not emulated"
        return internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_EMULATION, text)
    if m == Mnemonic.SWAPGS:
        return _swapgs(vcpu, insn)
    if m in (Mnemonic.IN, Mnemonic.OUT):
        is_in = m == Mnemonic.IN
        size = _SIZES[insn.op0_register if is_in else insn.op1_register]
        port_op = 1 if is_in else 0
        if insn.op_kind(port_op) == OpKind.IMMEDIATE8:
            port = insn.immediate8
        else:
            port = vcpu.cpu.get("rdx") & 0xFFFF
        _check_port(vcpu, port, size)
        data = None if is_in else vcpu.cpu.get("rax")
        finish = _finish_in if is_in else _finish_out
        return _exit_io(vcpu, port, size, data, lambda: finish(vcpu, insn.len, size))
    if m in _IN_STRING or m in _OUT_STRING:
        return _string_io(vcpu, insn)
    return None


def _check_port(vcpu: KvmVcpu, port: int, size: int) -> None:
    """``emulator_io_permitted``: IOPL, then the TSS's bitmap; #GP otherwise."""
    rflags = vcpu.rflags
    iopl = (rflags & X86_EFLAGS_IOPL) >> X86_EFLAGS_IOPL_BIT
    if not vcpu.sregs.cr0 & CR0_PE or (vcpu.cpl <= iopl and not rflags & X86_EFLAGS_VM):
        return
    sregs = vcpu.sync_sregs()
    denied = AccessFailed(GuestException(GP_VECTOR, 0))
    if sregs.tr.unusable or sregs.tr.limit < 103:
        raise denied
    bitmap = int.from_bytes(read_guest_virt(vcpu, sregs.tr.base + 102, 2, implicit=True), "little")
    at = bitmap + port // 8
    if at + 1 > sregs.tr.limit:
        raise denied
    bits = int.from_bytes(read_guest_virt(vcpu, sregs.tr.base + at, 2, implicit=True), "little")
    if bits >> (port & 7) & ((1 << size) - 1):
        raise denied


def _exit_io(
    vcpu: KvmVcpu, port: int, size: int, data: int | None, finish: Callable[[], int]
) -> int:
    """KVM_EXIT_IO for one element; ``data`` is what goes out, ``None`` asks for what comes in."""
    run = vcpu.run
    run.exit_reason = uapi.KVM_EXIT_IO
    run.io.direction = uapi.KVM_EXIT_IO_IN if data is None else uapi.KVM_EXIT_IO_OUT
    run.io.size, run.io.port, run.io.count = size, port, 1
    run.io.data_offset = PIO_PAGE_OFFSET
    if data is not None:
        low = data & (1 << 8 * size) - 1
        vcpu.run_area[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + size] = low.to_bytes(size, "little")
    vcpu.stat.io_exits += 1
    linear_rip = vcpu.cpu.linear_rip

    def complete() -> int:
        # RIP moves when userspace has done its part, unless that included moving RIP elsewhere:
        # complete_fast_pio_out() and complete_fast_pio_in() look, too.
        return finish() if vcpu.cpu.linear_rip == linear_rip else 1

    vcpu.complete_userspace_io = complete
    return 0


def _finish_out(vcpu: KvmVcpu, length: int, _size: int) -> int:
    vcpu.cpu.skip(length)
    return 1


def _finish_in(vcpu: KvmVcpu, length: int, size: int) -> int:
    data = int.from_bytes(vcpu.run_area[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + size], "little")
    rax = vcpu.cpu.get("rax")
    # A write to EAX clears the upper half of RAX; AL and AX leave the rest.
    keep = 0 if size == 4 else rax & ~((1 << 8 * size) - 1)
    vcpu.cpu.set("rax", keep | data)
    vcpu.cpu.skip(length)
    return 1


def _string_io(vcpu: KvmVcpu, insn: iced_x86.Instruction) -> int:
    """INS or OUTS, one element an exit; the processor would do as many as fit."""
    is_in = insn.mnemonic in _IN_STRING
    size = (_IN_STRING if is_in else _OUT_STRING)[insn.mnemonic]
    regs = vcpu.cpu.named_gprs()
    wide = _address_mask(insn, 1 if not is_in else 0)
    repeat = insn.has_rep_prefix or insn.has_repne_prefix
    if repeat and regs["rcx"] & wide == 0:
        vcpu.cpu.skip(insn.len)
        return 1
    port = regs["rdx"] & 0xFFFF
    _check_port(vcpu, port, size)
    pointer = "rdi" if is_in else "rsi"
    base = vcpu.cpu.segment_base("es" if is_in else _segment_name(insn))
    address = (base + (regs[pointer] & wide)) & _U64
    step = -size if regs["rflags"] & X86_EFLAGS_DF else size

    def advance() -> int:
        new = {pointer: regs[pointer] & ~wide | (regs[pointer] + step) & wide}
        last = True
        if repeat:
            count = (regs["rcx"] - 1) & wide
            new["rcx"] = regs["rcx"] & ~wide | count
            last = count == 0
        vcpu.cpu.write_gprs(new)
        if last:
            vcpu.cpu.skip(insn.len)
        return 1

    if not is_in:
        data = int.from_bytes(read_guest_virt(vcpu, address, size), "little")
        return _exit_io(vcpu, port, size, data, advance)
    probe_guest_virt(vcpu, address, size)  # before the device is read, which cannot be undone

    def store() -> int:
        data = bytes(vcpu.run_area[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + size])
        try:
            write_guest_virt(vcpu, address, data)
        except AccessFailed:
            # The page has gone since it was probed.  The data stays in the port I/O page, and the
            # next KVM_RUN tries to store it again.
            vcpu.complete_userspace_io = store
            raise
        return advance()

    return _exit_io(vcpu, port, size, None, store)


def _address_mask(insn: iced_x86.Instruction, memory_op: int) -> int:
    kind = insn.op_kind(memory_op)
    if kind in (OpKind.MEMORY_SEG_RSI, OpKind.MEMORY_ESRDI):
        return _U64
    return 0xFFFFFFFF if kind in (OpKind.MEMORY_SEG_ESI, OpKind.MEMORY_ESEDI) else 0xFFFF


_SEGMENT_NAMES = {
    Register.ES: "es",
    Register.CS: "cs",
    Register.SS: "ss",
    Register.DS: "ds",
    Register.FS: "fs",
    Register.GS: "gs",
}


def _segment_name(insn: iced_x86.Instruction) -> str:
    return _SEGMENT_NAMES[insn.memory_segment]


def _swapgs(vcpu: KvmVcpu, insn: iced_x86.Instruction) -> int:
    if vcpu.cpl:
        raise AccessFailed(GuestException(GP_VECTOR, 0))
    sregs, msrs = vcpu.sync_sregs(), vcpu.cpu.msrs
    sregs.gs.base, msrs["kernel_gs_base"] = msrs["kernel_gs_base"], sregs.gs.base
    vcpu.cpu.skip(insn.len)
    vcpu.load_sregs()
    return 1


# -- intercepts ------------------------------------------------------------------------------------


def emulate_intercept(vcpu: KvmVcpu, code: int) -> int:
    """An instruction that SVM intercepts."""
    match code:
        case SvmExit.HLT:
            vcpu.cpu.skip(decode(vcpu).len)
            vcpu.run.exit_reason = uapi.KVM_EXIT_HLT
            return 0
        case SvmExit.WRITE_CR0 | SvmExit.WRITE_CR3 | SvmExit.WRITE_CR4 | SvmExit.WRITE_CR8:
            return _write_control_register(vcpu, decode(vcpu))
        case SvmExit.MSR:
            return _access_msr(vcpu, decode(vcpu))
        case SvmExit.INVLPG:
            vcpu.cpu.skip(decode(vcpu).len)
            vcpu.forget_walks()
            vcpu.cpu.flush_tlb()
            return 1
        case SvmExit.SWINT:
            return _software_interrupt(vcpu, decode(vcpu))
        case _ if SvmExit.VMRUN <= code <= SvmExit.VMRUN + 6:
            raise AccessFailed(GuestException(UD_VECTOR))
    return internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_EMULATION, f"#VMEXIT {code:#x}")


def _software_interrupt(vcpu: KvmVcpu, insn: iced_x86.Instruction) -> int:
    vector = {Mnemonic.INT3: 3, Mnemonic.INTO: 4, Mnemonic.INT1: 1}.get(insn.mnemonic)
    if vector is None:
        vector = insn.immediate8
    raise AccessFailed(GuestException(vector, instruction_length=insn.len))


def _access_msr(vcpu: KvmVcpu, insn: iced_x86.Instruction) -> int:
    cpu = vcpu.cpu
    index = cpu.get("rcx") & 0xFFFFFFFF
    if insn.mnemonic == Mnemonic.RDMSR:
        value = read_msr(vcpu, index)
        if value is None:
            raise AccessFailed(GuestException(GP_VECTOR, 0))
        cpu.set("rax", value & 0xFFFFFFFF)
        cpu.set("rdx", value >> 32)
    else:
        value = (cpu.get("rdx") & 0xFFFFFFFF) << 32 | cpu.get("rax") & 0xFFFFFFFF
        if not write_msr(vcpu, index, value):
            raise AccessFailed(GuestException(GP_VECTOR, 0))
    vcpu.cpu.skip(insn.len)
    return 1


_GPR_NAMES = {
    getattr(Register, prefix + name[1:].upper()): name
    for name in ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"]
    for prefix in "RE"
} | {getattr(Register, f"R{i}"): f"r{i}" for i in range(8, 16)}


def _write_control_register(vcpu: KvmVcpu, insn: iced_x86.Instruction) -> int:
    sregs = vcpu.sync_sregs()
    if insn.mnemonic == Mnemonic.CLTS:
        register, value = Register.CR0, sregs.cr0 & ~CR0_TS
    elif insn.mnemonic == Mnemonic.MOV:
        register = insn.op0_register
        value = vcpu.cpu.get(_GPR_NAMES[insn.op1_register])
    else:
        text = "LMSW is not emulated"
        return internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_EMULATION, text)
    if register == Register.CR3:
        sregs.cr3 = value & ~(1 << 63)
    elif register == Register.CR4:
        if vcpu.long_mode and not value & CR4_PAE:
            raise AccessFailed(GuestException(GP_VECTOR, 0))
        sregs.cr4 = value
    elif register == Register.CR8:
        sregs.cr8 = value & 15
    else:
        if value & CR0_PG and not value & CR0_PE:
            raise AccessFailed(GuestException(GP_VECTOR, 0))
        if value & CR0_PG and not sregs.cr0 & CR0_PG and sregs.efer & EFER_LME:
            if not sregs.cr4 & CR4_PAE:
                raise AccessFailed(GuestException(GP_VECTOR, 0))
            sregs.efer |= EFER_LMA
        elif not value & CR0_PG:
            sregs.efer &= ~EFER_LMA
        sregs.cr0 = value
    vcpu.cpu.skip(insn.len)
    vcpu.load_sregs()
    return 1
