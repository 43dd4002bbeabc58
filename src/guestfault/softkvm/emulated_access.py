"""The memory of an instruction that KVM carries out: ``emulator_read_write`` (arch/x86/kvm/x86.c).

An operand is read or written by KVM's own copies (:mod:`guestfault.softkvm.guest_access`), page by
page.  A part for which that fails is a *fragment*; if there is one, userspace must make the access:
the exit is prepared at once, in the midst of the instruction, by filling ``kvm_run``.  A read then
stops the instruction, a write lets it go on.
"""

from __future__ import annotations

from iced_x86 import Register

from guestfault.softkvm.emulate_ctxt import EmulateCtxt, MmioFragment, X86Emul
from guestfault.softkvm.guest_access import (
    NOT_WRITABLE,
    copy_to_guest_page,
    kvm_mmu_gva_to_gpa,
    kvm_read_guest_virt_helper,
    kvm_vcpu_gfn_to_memslot,
    kvm_vcpu_read_guest_page,
    kvm_vcpu_write_guest_page,
    kvm_write_guest_virt_helper,
)
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.memslots import PAGE_SIZE
from guestfault.softkvm.page_track import kvm_page_track_write
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.refusal import Emulate, GuestException
from guestfault.uapi import kvm as uapi
from guestfault.x86.accesses import AccessKind, MemoryAccess, Role, accesses
from guestfault.x86.registers import GP_VECTOR, SS_VECTOR
from guestfault.x86.state import CpuState

__all__ = [
    "MAX_MMIO",
    "Operands",
    "emulator_read_write",
    "emulator_write_phys",
    "prepare_mmio_exit",
]

_CONTINUE, _IO_NEEDED = X86Emul.CONTINUE, X86Emul.IO_NEEDED
_PROPAGATE_FAULT, _UNHANDLEABLE = X86Emul.PROPAGATE_FAULT, X86Emul.UNHANDLEABLE
_OFFSET = PAGE_SIZE - 1
_PAGE = -PAGE_SIZE
_LINE = -64
MAX_MMIO = 8
"""Bytes that fit into ``kvm_run.mmio``."""
_READ, _WRITE = AccessKind.READ, AccessKind.WRITE


class Operands:
    """The memory of one instruction: an :class:`~guestfault.softkvm.processor.EmulatedMemory`."""

    def __init__(self, vcpu: KvmVcpu) -> None:
        self._vcpu = vcpu
        self._ctxt = ctxt = vcpu.emulate_ctxt
        self._looks_at_segments = ctxt.code_size != 64
        self._ahead: bytes | None = None
        if self._looks_at_segments or ctxt.shape.system or ctxt.shape.compares:
            _ = self._accesses  # while the registers are those at its beginning

    def read(self, linear: int, size: int) -> bytes | None:
        """``segmented_read``; where it fails, :attr:`EmulateCtxt.rc` says how."""
        ctxt = self._ctxt
        if ctxt.shape.compares:
            ahead, self._ahead = self._ahead, None
            if ahead is not None:
                return ahead
            source = next(a for a in self._accesses if a.role is Role.STRING_SOURCE)
            self._ahead = self._read(source.address or 0, size)
            if self._ahead is None:
                return None
        return self._read(linear, size)

    def _read(self, linear: int, size: int) -> bytes | None:
        ctxt = self._ctxt
        if self._is_beyond_limit(linear):
            return None
        if ctxt.shape.system and self._is_system(linear):
            return self._read_system(linear, size)
        if ctxt.mem_read_pos < len(ctxt.mem_read):
            data = ctxt.mem_read[ctxt.mem_read_pos]
            ctxt.mem_read_pos += 1
            return data[:size].ljust(size, b"\0")
        if ctxt.mmio_read_completed:  # read_prepare()
            ctxt.mmio_read_completed = False
            data = bytes(ctxt.mmio_val)
        else:
            val = bytearray(size)
            ctxt.rc = emulator_read_write(self._vcpu, linear, val, write=False)
            if ctxt.rc is not _CONTINUE:
                self._name_segment(linear)
                return None
            data = bytes(val)
        ctxt.mem_read.append(data)
        ctxt.mem_read_pos += 1
        return data[:size].ljust(size, b"\0")

    def write(self, linear: int, data: bytes) -> bool:
        """``segmented_write``, or ``segmented_cmpxchg`` for an atomic instruction."""
        ctxt = self._ctxt
        if self._is_beyond_limit(linear):
            return False
        if ctxt.shape.system and self._is_system(linear):
            return self._write_system(linear, data)
        if ctxt.shape.locked:
            ctxt.rc = _emulator_cmpxchg_emulated(self._vcpu, linear, data)
        else:
            ctxt.rc = emulator_read_write(self._vcpu, linear, bytearray(data), write=True)
        if ctxt.rc is _CONTINUE:
            return True
        self._name_segment(linear)
        return False

    def _read_system(self, linear: int, size: int) -> bytes | None:
        """``linear_read_system``: a descriptor, or the like.  It cannot be a device's."""
        ctxt = self._ctxt
        found = kvm_read_guest_virt_helper(self._vcpu, linear, size, system=True)
        if isinstance(found, bytes):
            return found
        ctxt.exception = found
        ctxt.rc = _IO_NEEDED if found is None else _PROPAGATE_FAULT
        return None

    def _write_system(self, linear: int, data: bytes) -> bool:
        """``linear_write_system``: a descriptor's accessed bit."""
        ctxt = self._ctxt
        found = kvm_write_guest_virt_helper(self._vcpu, linear, data)
        if found is True:
            return True
        ctxt.exception = found if isinstance(found, GuestException) else None
        ctxt.rc = _IO_NEEDED if ctxt.exception is None else _PROPAGATE_FAULT
        return False

    def _is_beyond_limit(self, linear: int) -> bool:
        """``linearize``: the processor does not look at the limits of segments, KVM does."""
        if self._looks_at_segments and any(
            access.refused and access.address == linear for access in self._accesses
        ):
            self._ctxt.exception = GuestException(GP_VECTOR, 0)
            self._ctxt.rc = _PROPAGATE_FAULT
            self._name_segment(linear)
            return True
        return False

    def _is_system(self, linear: int) -> bool:
        """Whether this is a descriptor table's, and not the instruction's own operand."""
        if any(access.address == linear and not access.system for access in self._accesses):
            return False
        sregs = self._vcpu.sregs
        tables = sregs.gdt, sregs.ldt, sregs.tr, sregs.idt
        return any(0 <= linear - table.base <= table.limit for table in tables)

    def _name_segment(self, linear: int) -> None:
        """An address that cannot be is #SS(0) where the stack is accessed, for #GP(0)."""
        exception = self._ctxt.exception
        if exception is None or exception.vector != GP_VECTOR:
            return
        insn = self._ctxt.insn
        by_stack = any(
            access.address == linear
            and (
                access.role is Role.STACK
                or (
                    access.role is Role.OPERAND
                    and insn is not None
                    and insn.memory_segment == Register.SS
                )
            )
            for access in self._accesses
        )
        if by_stack:
            self._ctxt.exception = GuestException(SS_VECTOR, 0)

    @property
    def _accesses(self) -> tuple[MemoryAccess, ...]:
        """All that this round of the instruction accesses: worked out once, as when decoded."""
        ctxt = self._ctxt
        if ctxt.accesses is None:
            vcpu = self._vcpu
            regs = uapi.kvm_regs(**vcpu.cpu.named_gprs() | {"rip": ctxt.eip})
            state = CpuState.from_kvm(regs, vcpu.sync_sregs())
            ctxt.accesses = accesses(ctxt.fetched, state, code_size=ctxt.code_size)
        return ctxt.accesses


def emulator_read_write(vcpu: KvmVcpu, addr: int, val: bytearray, *, write: bool) -> X86Emul:
    """One access, which may lie in two pages; if any of it needs userspace, prepare the exit."""
    ctxt = vcpu.emulate_ctxt
    ctxt.mmio_nr_fragments = 0
    first = min(len(val), PAGE_SIZE - (addr & _OFFSET))
    rc = _read_write_onepage(vcpu, addr, val, 0, first, write)
    if rc is _CONTINUE and first < len(val):
        addr += first
        if ctxt.code_size != 64:
            addr &= 0xFFFFFFFF
        rc = _read_write_onepage(vcpu, addr, val, first, len(val) - first, write)
    if rc is not _CONTINUE or not ctxt.mmio_nr_fragments:
        return rc
    ctxt.mmio_val = val
    ctxt.mmio_needed, ctxt.mmio_is_write, ctxt.mmio_cur_fragment = True, write, 0
    prepare_mmio_exit(vcpu, ctxt)
    return _CONTINUE if write else _IO_NEEDED


def _read_write_onepage(
    vcpu: KvmVcpu, addr: int, val: bytearray, at: int, size: int, write: bool
) -> X86Emul:
    ctxt = vcpu.emulate_ctxt
    kind = _WRITE if write else _READ
    fault = ctxt.fault
    if ctxt.gpa_available and fault is not None and _is_at_fault(ctxt, fault, addr, kind):
        gpa = fault.gpa & _PAGE | addr & _OFFSET
    else:
        found = kvm_mmu_gva_to_gpa(vcpu, addr, kind)
        if isinstance(found, GuestException):
            ctxt.exception = found
            return _PROPAGATE_FAULT
        gpa = found
    if not _vcpu_is_mmio_gpa(vcpu, gpa):
        if write:
            if emulator_write_phys(vcpu, gpa, bytes(val[at : at + size])):
                return _CONTINUE
        else:
            data = kvm_vcpu_read_guest_page(vcpu, gpa, size)
            if data is not None:
                val[at : at + size] = data
                return _CONTINUE
    ctxt.mmio_fragments[ctxt.mmio_nr_fragments :] = [MmioFragment(gpa, at, size)]
    ctxt.mmio_nr_fragments += 1
    return _CONTINUE


def _is_at_fault(ctxt: EmulateCtxt, fault: Emulate, addr: int, kind: AccessKind) -> bool:
    """Whether the access passes for the one that faulted, whose physical address is known.

    Linux goes by the offset in the page alone (``emulator_read_write_onepage``).  So where it was
    the walk that faulted, an operand with the offset of the table's entry is taken to lie in the
    table.  Of an access that was translated our processor gives the page, and no offset.
    """
    if ctxt.fault_page is None:
        return not (addr ^ fault.gpa) & _OFFSET
    return kind is fault.kind and addr & _PAGE == ctxt.fault_page


def _vcpu_is_mmio_gpa(vcpu: KvmVcpu, gpa: int) -> bool:
    """Whether the fault path has found no slot there: then no access to memory is tried."""
    mmio = vcpu.mmio
    if mmio is None or mmio.gfn != gpa >> 12:
        return False
    return mmio.generation == vcpu.kvm.memslots.generation


def emulator_write_phys(vcpu: KvmVcpu, gpa: int, data: bytes) -> bool:
    """Write inside one page, and tell whoever tracks it; ``False`` where that is no memory."""
    if not kvm_vcpu_write_guest_page(vcpu, gpa, data):
        return False
    kvm_page_track_write(vcpu, gpa, data)
    return True


def _emulator_cmpxchg_emulated(vcpu: KvmVcpu, addr: int, new: bytes) -> X86Emul:
    """The write of an atomic instruction: where memory fails, KVM gives up.

    The exchange itself is a plain write here: an engine's LOCK is atomic in its own vCPU only.
    """
    gpa = kvm_mmu_gva_to_gpa(vcpu, addr, _WRITE)
    size = len(new)
    if not isinstance(gpa, GuestException) and size in (1, 2, 4, 8):
        slot = kvm_vcpu_gfn_to_memslot(vcpu, gpa >> 12)
        one_line = (gpa + size - 1) & _LINE == gpa & _LINE
        if slot is not None and not slot.flags & NOT_WRITABLE and one_line:
            if not copy_to_guest_page(vcpu, gpa, new):
                vcpu.emulate_ctxt.why = f"an atomic access to memory at {gpa:#x}, which failed"
                return _UNHANDLEABLE
            kvm_page_track_write(vcpu, gpa, new)
            return _CONTINUE
    return emulator_read_write(vcpu, addr, bytearray(new), write=True)


def prepare_mmio_exit(vcpu: KvmVcpu, ctxt: EmulateCtxt) -> None:
    """Fill ``kvm_run`` for the fragment that is next."""
    preemption_point("emulator_read_write: fill kvm_run", ("kvm_run", vcpu.vcpu_id), True)
    run, fragment = vcpu.run, ctxt.mmio_fragments[ctxt.mmio_cur_fragment]
    size = min(MAX_MMIO, fragment.length)
    run.exit_reason = uapi.KVM_EXIT_MMIO
    run.mmio.phys_addr = fragment.gpa
    run.mmio.len = size
    run.mmio.is_write = ctxt.mmio_is_write
    if ctxt.mmio_is_write:
        run.mmio.data[:size] = ctxt.mmio_val[fragment.at : fragment.at + size]
