"""KVM's instruction emulator: what it does to memory, and when it asks userspace.

``x86_emulate_instruction`` and ``emulator_read_write`` (arch/x86/kvm/x86.c), with ``read_emulated``
of emulate.c.  An instruction comes here because one of its accesses is not to memory, or must not
be made by the processor.  From then on *all* of its accesses are KVM's own copies
(:mod:`guestfault.softkvm.guest_access`), and one that fails is taken for an access to a device: it
becomes a *fragment*, and KVM_EXIT_MMIO asks userspace to make it, be there a memory slot or not.
Nobody hears that it was memory that failed.

An exit is *prepared* as soon as the access is known to need it, in the midst of the instruction:
``kvm_run`` is filled and ``mmio_needed`` set.

- A read stops the instruction.  It leaves no trace in the registers, and when userspace has
  answered, it is carried out again from its beginning; what it had read before that comes from the
  read cache, what it had written is written again.
- A write lets it go on, and the exit is made when it has completed, with RIP past it.  There is
  room for one access.  If another one fails, it takes the place of the first, which is lost.  If
  the instruction ends in an exception, the guest gets that, and the exit is never made, though
  ``kvm_run`` holds it (Sean Christopherson, ZBNrWZQhMX8AHzWM@google.com, 16 March 2023).

The arithmetic is the processor's: it carries the instruction out in one step
(:meth:`guestfault.softkvm.processor.Processor.emulate`) and gets its memory from here.  So this
emulator knows more instructions than KVM's, which gives many up (KVM_EXIT_INTERNAL_ERROR).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from iced_x86 import Mnemonic

from guestfault.softkvm.em_io import PORT_IO, em_port_io
from guestfault.softkvm.em_stack import em_pusha
from guestfault.softkvm.emulate_ctxt import EmulateCtxt, X86Emul
from guestfault.softkvm.emulated_access import MAX_MMIO, Operands, prepare_mmio_exit
from guestfault.softkvm.exception_queue import from_intercept, kvm_queue_exception
from guestfault.softkvm.fault_address import exact_fault
from guestfault.softkvm.guest_access import kvm_fetch_guest_virt
from guestfault.softkvm.instruction_shape import PLAIN, shape_of
from guestfault.softkvm.internal_error import exit_info, prepare_emulation_failure_exit
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.memslots import PAGE_SIZE
from guestfault.softkvm.processor import STEPPED, TRAP, StopKind
from guestfault.softkvm.refusal import Emulate, GuestException
from guestfault.softkvm.vmcb import INTERCEPT_EXCEPTION
from guestfault.x86.instruction import MAX_LENGTH, decode
from guestfault.x86.registers import DB_VECTOR, UD_VECTOR, X86_EFLAGS_TF

__all__ = ["init_emulate_ctxt", "x86_emulate_instruction"]

_CONTINUE = X86Emul.CONTINUE
_PROPAGATE_FAULT, _UNHANDLEABLE = X86Emul.PROPAGATE_FAULT, X86Emul.UNHANDLEABLE
_OFFSET = PAGE_SIZE - 1
_NOT_EXECUTED = frozenset((Mnemonic.SYSCALL, Mnemonic.SYSENTER, Mnemonic.SWAPGS))


# -- an instruction --------------------------------------------------------------------------------


def x86_emulate_instruction(
    vcpu: KvmVcpu,
    fault: Emulate | None = None,
    execute: Callable[[], X86Emul] | None = None,
    *,
    no_decode: bool = False,
) -> int:
    """Carry out the instruction at RIP: 1 to go on, 0 for an exit to userspace.

    ``fault`` is the access that led here, ``execute`` what to do if the processor cannot do it.
    ``no_decode``: go on with the instruction that waited for userspace.  That is done as it was
    decoded then, and RIP is past it afterwards wherever userspace has moved it meanwhile.
    """
    ctxt = vcpu.emulate_ctxt
    if not no_decode:
        vcpu.pending_exception = None
        init_emulate_ctxt(vcpu, fault)
        ctxt.execute = execute
        rc = _x86_decode_insn(vcpu)
        if rc is not _CONTINUE:
            if ctxt.exception is not None:
                return kvm_queue_exception(vcpu, ctxt.exception)
            return _handle_emulation_failure(vcpu)
    while True:
        rc = _x86_emulate_insn(vcpu, ctxt)
        if rc is _UNHANDLEABLE:
            return _handle_emulation_failure(vcpu)
        if ctxt.exception is not None:
            ctxt.mmio_needed = False
            return kvm_queue_exception(vcpu, ctxt.exception)
        if ctxt.pio_count:
            if ctxt.pio_is_in:
                vcpu.complete_userspace_io = functools.partial(_complete_emulated_pio, vcpu)
            else:
                ctxt.pio_count = 0
                _write_back(vcpu, ctxt)
            return 0
        if ctxt.mmio_needed:
            vcpu.stat.mmio_exits += 1
            if ctxt.mmio_is_write:
                _write_back(vcpu, ctxt)
            vcpu.complete_userspace_io = functools.partial(_complete_emulated_mmio, vcpu)
            return 0
        if rc is _CONTINUE:
            _write_back(vcpu, ctxt)
            if _restarts(vcpu, ctxt):
                ctxt.mem_read.clear()
                ctxt.accesses = None
                continue
        # An access without MMIO has failed (X86EMUL_IO_NEEDED and nothing needed): the kernel has
        # no exit for that.  The guest tries again.
        if ctxt.tf and rc is _CONTINUE:
            return kvm_queue_exception(vcpu, GuestException(DB_VECTOR))
        return 1


def init_emulate_ctxt(vcpu: KvmVcpu, fault: Emulate | None) -> None:
    """Begin with the instruction at RIP, or with the delivery of an event there."""
    ctxt, cpu = vcpu.emulate_ctxt, vcpu.cpu
    ctxt.eip, ctxt.code_size = cpu.rip, cpu.code_size()
    ctxt.linear_rip = ctxt.eip if ctxt.code_size == 64 else cpu.linear_rip
    ctxt.tf = vcpu.rflags & X86_EFLAGS_TF != 0
    ctxt.fetched, ctxt.insn, ctxt.shape, ctxt.accesses = b"", None, PLAIN, None
    ctxt.mem_read.clear()
    ctxt.io_read, ctxt.io_read_pos = b"", 0
    ctxt.mmio_read_completed = False
    ctxt.exception = None
    ctxt.writeback.clear()
    ctxt.fault, ctxt.fault_page = fault, vcpu.refused_page
    # Under shadow paging nobody has translated the access but KVM, which walks again.
    ctxt.gpa_available = fault is not None and vcpu.kvm.tdp_enabled


def _x86_decode_insn(vcpu: KvmVcpu) -> X86Emul:
    """Fetch what is in RIP's page, and of the next one only what the instruction needs."""
    ctxt = vcpu.emulate_ctxt
    ctxt.why = "the emulator could not fetch the instruction"
    size = min(MAX_LENGTH, PAGE_SIZE - (ctxt.linear_rip & _OFFSET))
    while True:
        at = ctxt.linear_rip + len(ctxt.fetched)
        more = kvm_fetch_guest_virt(vcpu, at & (2**64 - 1), size)
        if isinstance(more, GuestException):
            ctxt.exception = more
            return _PROPAGATE_FAULT
        if more is None:
            return _UNHANDLEABLE
        ctxt.fetched += more
        insn, whole = decode(ctxt.fetched, ctxt.eip, ctxt.code_size)
        size = MAX_LENGTH - len(ctxt.fetched)
        if whole or not size:
            break
    if insn.is_invalid:
        ctxt.why = "no instruction that the emulator knows"
        return _UNHANDLEABLE
    if insn.mnemonic in (Mnemonic.PUSHA, Mnemonic.PUSHAD):
        size = 2 if insn.mnemonic == Mnemonic.PUSHA else 4
        ctxt.execute = functools.partial(em_pusha, vcpu, size)
    elif insn.mnemonic in PORT_IO:
        ctxt.execute = em_port_io(vcpu, insn)
    elif insn.mnemonic == Mnemonic.ENTER and insn.immediate8_2nd:
        ctxt.why = "ENTER with a nesting level"
        return _UNHANDLEABLE
    elif insn.mnemonic in _NOT_EXECUTED:
        ctxt.why = "SYSCALL, SYSENTER and SWAPGS are not emulated"
        return _UNHANDLEABLE
    ctxt.insn = insn
    ctxt.shape = shape = shape_of(ctxt.fetched[: insn.len], ctxt.code_size)
    if shape.count_mask or shape.two_operands:
        ctxt.gpa_available = False  # emulator_can_use_gpa(): of one access, in the first round
    return _CONTINUE


def _x86_emulate_insn(vcpu: KvmVcpu, ctxt: EmulateCtxt) -> X86Emul:
    ctxt.mem_read_pos = 0
    ctxt.exception, ctxt.rc = None, _CONTINUE
    return _em_step(vcpu, ctxt) if ctxt.execute is None else ctxt.execute()


def _em_step(vcpu: KvmVcpu, ctxt: EmulateCtxt) -> X86Emul:
    """Any instruction that the processor can carry out, given memory."""
    cpu = vcpu.cpu
    insn, shape = ctxt.insn, ctxt.shape
    assert insn is not None
    if cpu.rip != ctxt.eip:
        cpu.rip = ctxt.eip
    stop = cpu.emulate(ctxt.linear_rip, ctxt.fetched[: insn.len], shape.operand, Operands(vcpu))
    if stop is STEPPED or stop == TRAP:
        return _CONTINUE
    if stop.kind is StopKind.ABANDONED:
        return ctxt.rc
    vector = stop.code - INTERCEPT_EXCEPTION
    if stop.kind is StopKind.INTERCEPT and 0 <= vector < 32:
        ctxt.exception = from_intercept(vector)
        return _PROPAGATE_FAULT
    ctxt.why = f"an instruction that stops the processor ({stop.kind.name}) {stop.text}"
    return _UNHANDLEABLE


def _restarts(vcpu: KvmVcpu, ctxt: EmulateCtxt) -> bool:
    """EMULATION_RESTART: whether the emulator itself goes on with a repeated instruction.

    It does for 1024 rounds, or as long as it has port input left; then the guest is entered.
    """
    mask = ctxt.shape.count_mask
    if not mask or vcpu.cpu.rip != ctxt.eip:
        return False
    if ctxt.io_read:
        return ctxt.io_read_pos != len(ctxt.io_read)
    return vcpu.cpu.get("rcx") & mask & 0x3FF != 0


def _write_back(vcpu: KvmVcpu, ctxt: EmulateCtxt) -> None:
    """``writeback_registers``, where the processor has not done it."""
    if ctxt.writeback:
        vcpu.cpu.write_gprs(ctxt.writeback)
        ctxt.writeback.clear()


def _handle_emulation_failure(vcpu: KvmVcpu) -> int:
    """The guest gets #UD; if it is its kernel's instruction, userspace is told as well."""
    ctxt = vcpu.emulate_ctxt
    kvm_queue_exception(vcpu, GuestException(UD_VECTOR))
    vcpu.last_error = ctxt.why
    if vcpu.cpl:
        return 1
    prepare_emulation_failure_exit(vcpu, ctxt.fetched, exit_info(vcpu, exact_fault(vcpu)))
    return 0


# -- userspace has answered ------------------------------------------------------------------------


def _complete_emulated_mmio(vcpu: KvmVcpu) -> int:
    """Userspace has made an access of eight bytes at most: on with the next, or the instruction."""
    ctxt = vcpu.emulate_ctxt
    fragment = ctxt.mmio_fragments[ctxt.mmio_cur_fragment]
    size = min(MAX_MMIO, fragment.length)
    if not ctxt.mmio_is_write:
        ctxt.mmio_val[fragment.at : fragment.at + size] = bytes(vcpu.run.mmio.data[:size])
    if fragment.length <= MAX_MMIO:
        ctxt.mmio_cur_fragment += 1
    else:
        fragment.gpa, fragment.at = fragment.gpa + size, fragment.at + size
        fragment.length -= size
    if ctxt.mmio_cur_fragment < ctxt.mmio_nr_fragments:
        prepare_mmio_exit(vcpu, ctxt)
        vcpu.complete_userspace_io = functools.partial(_complete_emulated_mmio, vcpu)
        return 0
    ctxt.mmio_needed = False
    if ctxt.mmio_is_write:
        return 1
    ctxt.mmio_read_completed = True
    return x86_emulate_instruction(vcpu, no_decode=True)


def _complete_emulated_pio(vcpu: KvmVcpu) -> int:
    """Userspace has given what port input reads."""
    return x86_emulate_instruction(vcpu, no_decode=True)
