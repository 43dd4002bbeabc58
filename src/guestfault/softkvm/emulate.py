"""Instructions at which the guest stops by itself: HLT, MSRs, control registers, INT n, port I/O.

The processor names each in its exit, and each has its handler: here, or in
:mod:`guestfault.softkvm.pio`.  One that is not known is KVM_EXIT_INTERNAL_ERROR with the bytes that
could not be emulated; it is never skipped.  They access no memory, but for string port I/O, and for
INT n where KVM itself delivers that (:mod:`guestfault.softkvm.realmode`).
"""

from __future__ import annotations

import functools

import iced_x86
from iced_x86 import CodeSize, Mnemonic, Register

from guestfault.softkvm.async_pf import (
    kvm_async_pf_hash_reset,
    kvm_clear_async_pf_completion_queue,
)
from guestfault.softkvm.block import kvm_emulate_halt
from guestfault.softkvm.em_io import STRING_IO
from guestfault.softkvm.emulator import x86_emulate_instruction
from guestfault.softkvm.internal_error import decode, internal_error
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.msr import read_msr, write_msr
from guestfault.softkvm.pio import kvm_fast_pio, string_io
from guestfault.softkvm.realmode import em_int
from guestfault.softkvm.refusal import AccessFailed, GuestException
from guestfault.softkvm.shadow_context import kvm_mmu_invlpg, load_pdptrs
from guestfault.softkvm.vmcb import SvmExit
from guestfault.uapi import kvm as uapi
from guestfault.x86.addressing import CodeContext
from guestfault.x86.registers import (
    CR0_CD,
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR0_TS,
    CR4_PAE,
    CR4_PGE,
    CR4_PSE,
    CR4_SMEP,
    EFER_LMA,
    EFER_LME,
    GP_VECTOR,
    UD_VECTOR,
)
from guestfault.x86.state import CpuState

__all__ = ["emulate_intercept", "emulate_planted"]


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
        return kvm_fast_pio(vcpu, insn)
    if m in STRING_IO:
        return string_io(vcpu, insn)
    return None


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
            return kvm_emulate_halt(vcpu)
        case SvmExit.WRITE_CR0 | SvmExit.WRITE_CR3 | SvmExit.WRITE_CR4 | SvmExit.WRITE_CR8:
            return _write_control_register(vcpu, decode(vcpu))
        case SvmExit.MSR:
            return _access_msr(vcpu, decode(vcpu))
        case SvmExit.INVLPG:
            return _invlpg(vcpu, decode(vcpu))
        case SvmExit.SWINT:
            return _software_interrupt(vcpu, decode(vcpu))
        case _ if SvmExit.VMRUN <= code <= SvmExit.VMRUN + 6:
            raise AccessFailed(GuestException(UD_VECTOR))
    return internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_EMULATION, f"#VMEXIT {code:#x}")


def _invlpg(vcpu: KvmVcpu, insn: iced_x86.Instruction) -> int:
    if vcpu.mmu is not None:
        context = CodeContext(
            CpuState.from_kvm(uapi.kvm_regs(**vcpu.cpu.named_gprs()), vcpu.sync_sregs()),
            vcpu.cpu.code_size(),
        )
        base, index = insn.memory_base, insn.memory_index
        size = (
            iced_x86.RegisterInfo(base or index).size if base or index else insn.memory_displ_size
        )
        address = context.offset(
            base, index, insn.memory_index_scale, insn.memory_displacement, _CODE_SIZES[size]
        )
        kvm_mmu_invlpg(vcpu, context.linear(insn.memory_segment, address))
    vcpu.cpu.skip(insn.len)
    vcpu.forget_walks()
    vcpu.cpu.flush_tlb()
    return 1


def _software_interrupt(vcpu: KvmVcpu, insn: iced_x86.Instruction) -> int:
    vector = {Mnemonic.INT3: 3, Mnemonic.INTO: 4, Mnemonic.INT1: 1}.get(insn.mnemonic)
    if vector is None:
        vector = insn.immediate8
    if not vcpu.kvm.unrestricted_guest and not vcpu.sregs.cr0 & CR0_PE:
        return x86_emulate_instruction(vcpu, execute=functools.partial(em_int, vcpu, vector))
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


_CR0_PDPTR_BITS = CR0_CD | CR0_NW | CR0_PG
_CR4_PDPTR_BITS = CR4_PGE | CR4_PSE | CR4_PAE | CR4_SMEP
_CODE_SIZES = {2: CodeSize.CODE16, 4: CodeSize.CODE32, 8: CodeSize.CODE64}
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
        value &= ~(1 << 63)
        _load_pdptrs(vcpu, sregs.cr0, value, sregs.cr4)
        sregs.cr3 = value
    elif register == Register.CR4:
        if vcpu.long_mode and not value & CR4_PAE:
            raise AccessFailed(GuestException(GP_VECTOR, 0))
        if (value ^ sregs.cr4) & _CR4_PDPTR_BITS:
            _load_pdptrs(vcpu, sregs.cr0, sregs.cr3, value)
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
        elif (value ^ sregs.cr0) & _CR0_PDPTR_BITS:
            _load_pdptrs(vcpu, value, sregs.cr3, sregs.cr4)
        if not value & CR0_PG:
            sregs.efer &= ~EFER_LMA
        if (value ^ sregs.cr0) & CR0_PG:
            # kvm_post_set_cr0(): what was to be done again belongs to another mode.
            kvm_clear_async_pf_completion_queue(vcpu)
            kvm_async_pf_hash_reset(vcpu)
        sregs.cr0 = value
    vcpu.cpu.skip(insn.len)
    vcpu.load_sregs()
    return 1


def _load_pdptrs(vcpu: KvmVcpu, cr0: int, cr3: int, cr4: int) -> None:
    """Under shadow paging KVM reads a PAE guest's PDPTEs when they are loaded; #GP if it cannot.

    With nested paging the processor reads them from memory, on each walk.
    """
    if vcpu.mmu is None or not (cr0 & CR0_PG and cr4 & CR4_PAE) or vcpu.sregs.efer & EFER_LME:
        return
    if not load_pdptrs(vcpu, cr3):
        raise AccessFailed(GuestException(GP_VECTOR, 0))
