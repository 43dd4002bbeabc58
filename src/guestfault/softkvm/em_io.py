"""Port I/O that KVM's emulator carries out: ``em_in`` and ``em_out`` (arch/x86/kvm/emulate.c).

INS and OUTS always come here, on every processor, for one side of them is memory, and KVM accesses
that as it does for any instruction it carries out (:mod:`guestfault.softkvm.emulated_access`):
where its copy fails, the guest's RAM becomes a device.

- OUTS reads first.  From an absent page that is KVM_EXIT_MMIO for a read; then comes the port.
  When userspace sees KVM_EXIT_IO, the element is done: the registers have moved on.
- INS asks the port first, for as many elements as the rest of the page has room for, and moves
  when it has them.  To an absent page the store is then KVM_EXIT_MMIO, and is lost unless
  userspace makes it: the instruction is past.

IN and OUT touch no memory.  They come here where it was their own fetch that faulted, on its way
through the guest's page tables.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import iced_x86
from iced_x86 import Mnemonic, OpKind, Register

from guestfault.softkvm.emulate_ctxt import X86Emul
from guestfault.softkvm.emulated_access import Operands
from guestfault.softkvm.guest_access import kvm_read_guest_virt_helper
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.refusal import GuestException
from guestfault.uapi import kvm as uapi
from guestfault.x86.addressing import SEGMENT_NAMES
from guestfault.x86.registers import (
    CR0_PE,
    GP_VECTOR,
    X86_EFLAGS_DF,
    X86_EFLAGS_IOPL,
    X86_EFLAGS_IOPL_BIT,
    X86_EFLAGS_VM,
)

__all__ = [
    "PIO_PAGE_OFFSET",
    "PORT_IO",
    "STRING_IO",
    "em_port_io",
    "emulator_io_permitted",
    "exit_io",
    "finish_in",
    "port_of",
]

PIO_PAGE_OFFSET = uapi.KVM_PIO_PAGE_OFFSET * 4096
_IO_READ_AHEAD = 1024  # bytes: struct read_cache
_PAGE_SIZE = 4096
_U64 = 2**64 - 1
_CONTINUE = X86Emul.CONTINUE

_SIZES = {Register.AL: 1, Register.AX: 2, Register.EAX: 4}
_IN_STRING = {Mnemonic.INSB: 1, Mnemonic.INSW: 2, Mnemonic.INSD: 4}
_OUT_STRING = {Mnemonic.OUTSB: 1, Mnemonic.OUTSW: 2, Mnemonic.OUTSD: 4}
STRING_IO = _IN_STRING | _OUT_STRING
"""INS and OUTS, and the bytes of an element."""
PORT_IO = frozenset(STRING_IO) | {Mnemonic.IN, Mnemonic.OUT}


def em_port_io(vcpu: KvmVcpu, insn: iced_x86.Instruction) -> Callable[[], X86Emul]:
    """What carries out an instruction of :data:`PORT_IO`."""
    if insn.mnemonic in _IN_STRING:
        return functools.partial(_em_ins, vcpu, _IN_STRING[insn.mnemonic])
    if insn.mnemonic in _OUT_STRING:
        return functools.partial(_em_outs, vcpu, _OUT_STRING[insn.mnemonic])
    return functools.partial(_em_in if insn.mnemonic == Mnemonic.IN else _em_out, vcpu)


# -- ports -----------------------------------------------------------------------------------------


def port_of(vcpu: KvmVcpu, insn: iced_x86.Instruction) -> tuple[int, int]:
    """The port of an IN or OUT, and how many bytes it moves."""
    is_in = insn.mnemonic == Mnemonic.IN
    size = _SIZES[insn.op0_register if is_in else insn.op1_register]
    if insn.op_kind(1 if is_in else 0) == OpKind.IMMEDIATE8:
        return insn.immediate8, size
    return vcpu.cpu.get("rdx") & 0xFFFF, size


def exit_io(vcpu: KvmVcpu, port: int, size: int, count: int, data: bytes | None) -> None:
    """Fill ``kvm_run``; ``data`` is what goes out, ``None`` asks for what comes in."""
    run = vcpu.run
    run.exit_reason = uapi.KVM_EXIT_IO
    run.io.direction = uapi.KVM_EXIT_IO_IN if data is None else uapi.KVM_EXIT_IO_OUT
    run.io.size, run.io.port, run.io.count = size, port, count
    run.io.data_offset = PIO_PAGE_OFFSET
    if data is not None:
        vcpu.run_area[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + len(data)] = data
    vcpu.stat.io_exits += 1


def finish_in(vcpu: KvmVcpu, size: int) -> int:
    """RAX after an IN, with what userspace has given."""
    data = int.from_bytes(_pio_data(vcpu, size), "little")
    # A write to EAX clears the upper half of RAX; AL and AX leave the rest.
    keep = 0 if size == 4 else vcpu.cpu.get("rax") & ~((1 << 8 * size) - 1)
    return keep | data


def _pio_data(vcpu: KvmVcpu, size: int) -> bytes:
    return bytes(vcpu.run_area[PIO_PAGE_OFFSET : PIO_PAGE_OFFSET + size])


def emulator_io_permitted(
    vcpu: KvmVcpu, port: int, size: int, read: Callable[[int, int], bytes | None]
) -> bool:
    """Whether the guest may use the port: IOPL, then the TSS's bitmap.

    ``read(linear, size)`` reads as the processor does for itself, or as KVM does for it.
    """
    rflags = vcpu.rflags
    iopl = (rflags & X86_EFLAGS_IOPL) >> X86_EFLAGS_IOPL_BIT
    if not vcpu.sregs.cr0 & CR0_PE or (vcpu.cpl <= iopl and not rflags & X86_EFLAGS_VM):
        return True
    task = vcpu.sync_sregs().tr
    if task.unusable or task.limit < 103:
        return False
    base = read(task.base + 102, 2)
    if base is None:
        return False
    at = int.from_bytes(base, "little") + port // 8
    if at + 1 > task.limit:
        return False
    bits = read(task.base + at, 2)
    if bits is None:
        return False
    return not int.from_bytes(bits, "little") >> (port & 7) & ((1 << size) - 1)


def _permitted(vcpu: KvmVcpu, port: int, size: int) -> bool:
    """``check_perm_in``, ``check_perm_out``: else the guest gets #GP."""

    def read(linear: int, length: int) -> bytes | None:
        found = kvm_read_guest_virt_helper(vcpu, linear, length, system=True)
        return found if isinstance(found, bytes) else None

    if emulator_io_permitted(vcpu, port, size, read):
        return True
    vcpu.emulate_ctxt.exception = GuestException(GP_VECTOR, 0)
    return False


def _retire(vcpu: KvmVcpu) -> None:
    """Put RIP behind the instruction."""
    ctxt = vcpu.emulate_ctxt
    assert ctxt.insn is not None
    ctxt.writeback["rip"] = (ctxt.eip + ctxt.insn.len) & ((1 << ctxt.code_size) - 1)


# -- IN and OUT ------------------------------------------------------------------------------------


def _em_in(vcpu: KvmVcpu) -> X86Emul:
    ctxt = vcpu.emulate_ctxt
    assert ctxt.insn is not None
    port, size = port_of(vcpu, ctxt.insn)
    if not ctxt.pio_count:
        if not _permitted(vcpu, port, size):
            return X86Emul.PROPAGATE_FAULT
        ctxt.pio_count, ctxt.pio_is_in = 1, True
        exit_io(vcpu, port, size, 1, None)
        return X86Emul.IO_NEEDED
    ctxt.pio_count = 0
    ctxt.writeback["rax"] = finish_in(vcpu, size)
    _retire(vcpu)
    return _CONTINUE


def _em_out(vcpu: KvmVcpu) -> X86Emul:
    ctxt = vcpu.emulate_ctxt
    assert ctxt.insn is not None
    port, size = port_of(vcpu, ctxt.insn)
    if not _permitted(vcpu, port, size):
        return X86Emul.PROPAGATE_FAULT
    low = vcpu.cpu.get("rax") & (1 << 8 * size) - 1
    exit_io(vcpu, port, size, 1, low.to_bytes(size, "little"))
    ctxt.pio_count, ctxt.pio_is_in = 1, False
    _retire(vcpu)
    return _CONTINUE


# -- INS and OUTS ----------------------------------------------------------------------------------


class _StringIo:
    """One round of INS or OUTS: its registers, as they are before."""

    def __init__(self, vcpu: KvmVcpu, size: int, pointer: str, memory_op: int) -> None:
        self.vcpu, self.ctxt, self.size = vcpu, vcpu.emulate_ctxt, size
        assert self.ctxt.insn is not None
        self.insn = self.ctxt.insn
        self.regs = vcpu.cpu.named_gprs()
        self.wide = _address_mask(self.insn, memory_op)
        self.repeat = self.ctxt.shape.count_mask != 0
        self.count = self.regs["rcx"] & self.wide
        self.port = self.regs["rdx"] & 0xFFFF
        self.pointer = pointer
        self.address = self.regs[pointer] & self.wide
        self.backwards = self.regs["rflags"] & X86_EFLAGS_DF != 0

    def linear(self, segment: str) -> int:
        """Where its memory operand is."""
        return (self.vcpu.cpu.segment_base(segment) + self.address) & _U64

    def advance(self, elements: int) -> None:
        """Move the registers on; RIP only if nothing is repeated."""
        step = -self.size if self.backwards else elements * self.size
        new = self.ctxt.writeback
        pointer = self.regs[self.pointer]
        new[self.pointer] = pointer & ~self.wide | (pointer + step) & self.wide
        if self.repeat:
            new["rcx"] = self.regs["rcx"] & ~self.wide | (self.regs["rcx"] - elements) & self.wide
        else:
            _retire(self.vcpu)


def _settled(vcpu: KvmVcpu, io: _StringIo) -> X86Emul | None:
    """What comes of it if nothing is to be moved; ``None``: something is."""
    if not _permitted(vcpu, io.port, io.size):
        return X86Emul.PROPAGATE_FAULT
    if io.repeat and not io.count:
        _retire(vcpu)
        return _CONTINUE
    return None


def _em_outs(vcpu: KvmVcpu, size: int) -> X86Emul:
    ctxt = vcpu.emulate_ctxt
    io = _StringIo(vcpu, size, "rsi", 1)
    if (settled := _settled(vcpu, io)) is not None:
        return settled
    data = Operands(vcpu).read(io.linear(SEGMENT_NAMES[io.insn.memory_segment]), size)
    if data is None:
        return ctxt.rc
    exit_io(vcpu, io.port, size, 1, data)
    ctxt.pio_count, ctxt.pio_is_in = 1, False
    io.advance(1)
    return _CONTINUE


def _em_ins(vcpu: KvmVcpu, size: int) -> X86Emul:
    ctxt = vcpu.emulate_ctxt
    io = _StringIo(vcpu, size, "rdi", 0)
    if (settled := _settled(vcpu, io)) is not None:
        return settled
    if not _pio_in_emulated(vcpu, io):
        return X86Emul.IO_NEEDED
    # Forwards, all that was read goes to memory in one write.
    elements = 1
    if io.repeat and not io.backwards:
        elements = (len(ctxt.io_read) - ctxt.io_read_pos) // size
    at, ctxt.io_read_pos = ctxt.io_read_pos, ctxt.io_read_pos + elements * size
    if not Operands(vcpu).write(io.linear("es"), ctxt.io_read[at : ctxt.io_read_pos]):
        return ctxt.rc
    io.advance(elements)
    return _CONTINUE


def _pio_in_emulated(vcpu: KvmVcpu, io: _StringIo) -> bool:
    """Whether there are elements read ahead; if not, the exit that asks for some is prepared."""
    ctxt = vcpu.emulate_ctxt
    if ctxt.io_read_pos < len(ctxt.io_read):
        return True
    if ctxt.pio_count:
        ctxt.io_read, ctxt.io_read_pos = _pio_data(vcpu, ctxt.pio_count * io.size), 0
        ctxt.pio_count = 0
        return True
    offset = io.regs["rdi"] & (_PAGE_SIZE - 1)
    in_page = offset if io.backwards else _PAGE_SIZE - offset
    count = io.count if io.repeat else 1
    ctxt.pio_count = max(1, min(in_page, _IO_READ_AHEAD // io.size, count))
    ctxt.pio_is_in = True
    exit_io(vcpu, io.port, io.size, ctxt.pio_count, None)
    return False


def _address_mask(insn: iced_x86.Instruction, memory_op: int) -> int:
    kind = insn.op_kind(memory_op)
    if kind in (OpKind.MEMORY_SEG_RSI, OpKind.MEMORY_ESRDI):
        return _U64
    return 0xFFFFFFFF if kind in (OpKind.MEMORY_SEG_ESI, OpKind.MEMORY_ESEDI) else 0xFFFF
