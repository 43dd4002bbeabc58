"""The processor of the software KVM: a Unicorn engine in SVM guest mode, with us as its MMU.

What it gives the rest of the room is one call, :meth:`Cpu.run`, that executes guest code until
something needs KVM, and says what: a :class:`Stop`.

- *Memory.*  Unicorn's TLB is in virtual mode: on every TLB miss it asks ``tlb_fill(gva, access)``
  and gets a guest physical address and rights, or a refusal, on which it stops with RIP on the
  instruction.  RAM is one ``mem_map_ptr`` per slot.
- *Emulation.*  To carry out an instruction that KVM emulates is one single step in which the
  processor sees no memory of the guest, but a copy of the instruction
  (:mod:`guestfault.softkvm.emulated_code`) and a window whose accesses come back as calls
  (:mod:`guestfault.softkvm.device_window`).
- *Privileged instructions* are SVM intercepts and exact: HLT, MSR and control register accesses,
  INVLPG, INT n and every exception arrive with RIP on the instruction.
- *Port I/O* is not: Unicorn runs IN and OUT without asking anyone and goes on inside the block.  So
  each newly translated block is looked through before it runs, and a stop is planted on the port
  instructions in it; SYSCALL and SYSENTER, which Unicorn skips, likewise.

Limits, which are Unicorn's: LOCK is atomic within one vCPU only, and code that one vCPU rewrites
under another's translation is not noticed until something flushes it.
"""

from __future__ import annotations

import ctypes
import functools
import mmap

import unicorn
from unicorn import x86_const as ux

from guestfault.softkvm.device_window import DEVICE_WINDOW, DeviceWindow
from guestfault.softkvm.emulated_code import EmulatedCode
from guestfault.softkvm.engine import Engine, Registers, State, error_text
from guestfault.softkvm.planted import Planted
from guestfault.softkvm.processor import (
    ABANDONED,
    GPRS,
    MAX_PHYS,
    REFUSED,
    REQUESTED,
    STEPPED,
    TRAP,
    Access,
    EmulatedMemory,
    Hooks,
    Stop,
    StopKind,
)
from guestfault.softkvm.segment_cache import SegmentCache, find_offset, read_segment, read_segments
from guestfault.softkvm.vmcb import VMCB_SIZE, fill_vmcb
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import CR4_PAE, EFER_LMA, X86_EFLAGS_TF

__all__ = ["Cpu"]

_PRIVATE = DEVICE_WINDOW + MAX_PHYS
_CODE, _HSAVE, _VMCB, _BITMAPS = 0x0000, 0x1000, 0x2000, 0x3000
_PRIVATE_SIZE = 0x7000
_COPIES = _PRIVATE + 0x100_0000
_FETCH = int(Access.FETCH)
_VMLOAD_VMRUN = bytes.fromhex("0f01da 0f01d8")
_ENTRY = 0x10000  # linear address of the entry code; nothing else is mapped while it runs

_MSR_EFER, _MSR_VM_HSAVE_PA = 0xC0000080, 0xC0010117
_EFER_SVME = 1 << 12
_VMEXIT = 0x100  # Unicorn reports a #VMEXIT as interrupt number 0x100 + code

_GPR_IDS = {name: getattr(ux, f"UC_X86_REG_{name.upper()}") for name in GPRS}
# What VMRUN does not load and leaving guest mode resets: carried over by hand.
_CARRIED_IDS = [
    *(ux.UC_X86_REG_YMM0 + i for i in range(16)),
    *(ux.UC_X86_REG_FPCW, ux.UC_X86_REG_FPSW, ux.UC_X86_REG_FPTAG, ux.UC_X86_REG_MXCSR),
    *(ux.UC_X86_REG_FP0 + i for i in range(8)),
    *(ux.UC_X86_REG_DR0 + i for i in (0, 1, 2, 3)),
]
_SENTINEL = 0x7A5C_93E1_0B4D_68F2  # a segment base that occurs nowhere else in a processor's state


_PLANTED = Stop(StopKind.PLANTED)


class Cpu:
    """A :class:`~guestfault.softkvm.processor.Processor` that executes real guest code."""

    def __init__(self, hooks: Hooks) -> None:
        self._tlb_fill = hooks.tlb_fill
        self._fetch = hooks.fetch
        # The model must be named for its SVM to be on.
        self._engine = engine = Engine(ux.UC_CPU_X86_EPYC)
        self._private = mmap.mmap(-1, _PRIVATE_SIZE)
        self._private[_CODE : _CODE + len(_VMLOAD_VMRUN)] = _VMLOAD_VMRUN
        self._private[_BITMAPS:_PRIVATE_SIZE] = b"\xff" * (_PRIVATE_SIZE - _BITMAPS)
        with memoryview(self._private) as view:
            anchor = ctypes.c_char.from_buffer(view)
            engine.map(_PRIVATE, _PRIVATE_SIZE, ctypes.addressof(anchor))
            del anchor
        self._window = window = DeviceWindow()
        engine.map_devices(DEVICE_WINDOW, MAX_PHYS, window.on_read, window.on_write)
        self._on_access = engine.accesses_callback(window.on_access)
        self._copies = EmulatedCode(engine, _COPIES)
        engine.hook_tlb_fill(self._on_tlb_miss)
        engine.hook_interrupt(self._on_interrupt)
        engine.hook_new_block(self._on_new_block)
        engine.write_msr(_MSR_VM_HSAVE_PA, _PRIVATE + _HSAVE)
        engine.write_msr(_MSR_EFER, engine.read_msr(_MSR_EFER) | _EFER_SVME)
        self._read_rip = engine.reader(ux.UC_X86_REG_RIP)
        self.read_cs = engine.reader(ux.UC_X86_REG_CS)
        """CS as the guest would read it; its low bits are the privilege level."""
        self.read_rflags = engine.reader(ux.UC_X86_REG_RFLAGS)
        # VMRUN loads CR0 before CR4, and Unicorn will not have long mode's paging without PAE.
        engine.write(ux.UC_X86_REG_CR4, CR4_PAE)
        self._planted = Planted(engine, self._on_planted)
        self._gprs = Registers(engine, list(_GPR_IDS.values()))
        self._carried = Registers(engine, _CARRIED_IDS, width=32)
        self._outside, self._now, self._saved = State(engine), State(engine), State(engine)
        self._outside.save()
        self._entering = False
        self._emulating = False
        self._special = False  # one of the two: the TLB is not the guest's
        self._retranslate = False
        self._stop: Stop | None = None
        self.efer = 0  # kept here: an MSR read in guest mode is an intercept, even from outside
        self.msrs = dict.fromkeys(
            (
                *("star", "lstar", "cstar", "sfmask", "kernel_gs_base"),
                *("sysenter_cs", "sysenter_esp", "sysenter_eip"),
            ),
            0,
        )

    def close(self) -> None:
        """Free the engine: it keeps the mappings of guest memory that it was given."""
        self._engine.close()
        self._private.close()
        self._copies.close()

    # -- memory -------------------------------------------------------------------------------

    def map_ram(self, gpa: int, size: int, hva: int) -> None:
        """Put host memory at a guest physical address.  Rights are the TLB's business."""
        self._engine.map(gpa, size, hva)

    def unmap_ram(self, gpa: int, size: int) -> None:
        """Take it away again."""
        self._engine.unmap(gpa, size)

    def flush_tlb(self) -> None:
        """Forget every translation; the next access of each page asks again."""
        self._engine.flush_tlb()

    def flush_code(self) -> None:
        """Forget translated code, because the bytes under it may have changed."""
        self._engine.flush_code()

    # -- state --------------------------------------------------------------------------------

    def load(self, sregs: uapi.kvm_sregs) -> None:
        """Leave guest mode, if in it, and enter it again with these system registers.

        General, vector, x87 and debug registers stay as they are.
        """
        engine = self._engine
        self._gprs.read()
        self._carried.read()
        self._outside.restore()
        gprs = dict(zip(GPRS, self._gprs.values, strict=True))
        with memoryview(self._private) as private:
            fill_vmcb(
                private[_VMCB : _VMCB + VMCB_SIZE],
                sregs,
                rip=0,
                rsp=gprs["rsp"],
                rax=gprs["rax"],
                rflags=gprs["rflags"],
                msrs=self.msrs,
                bitmaps=_PRIVATE + _BITMAPS,
            )
        engine.write(ux.UC_X86_REG_RAX, _PRIVATE + _VMCB)
        self._entering = self._special = True
        engine.flush_tlb()
        # A stop that came too late for the last run would end this one before VMRUN.
        engine.forget_stop()
        engine.start(_ENTRY)  # fails as the guest's first instruction is fetched: VMRUN is done
        self._entering = self._special = False
        self.efer = sregs.efer
        engine.flush_tlb()
        self._gprs.write()
        self._carried.write()
        engine.write(ux.UC_X86_REG_CR2, sregs.cr2)

    def read_gprs(self) -> tuple[int, ...]:
        """The general registers, RIP and RFLAGS in the order of :data:`GPRS`."""
        self._gprs.read()
        return tuple(self._gprs.values)

    def named_gprs(self) -> dict[str, int]:
        """The same, by name."""
        return dict(zip(GPRS, self.read_gprs(), strict=True))

    def write_gprs(self, values: dict[str, int]) -> None:
        """Write some of them, by name."""
        for name, value in values.items():
            self._engine.write(_GPR_IDS[name], value)

    def get(self, name: str) -> int:
        """One general register, by name."""
        return self._engine.read(_GPR_IDS[name])

    def set(self, name: str, value: int) -> None:
        """Write one general register, by name."""
        self._engine.write(_GPR_IDS[name], value)

    def set_cr2(self, value: int) -> None:
        """Write CR2."""
        self._engine.write(ux.UC_X86_REG_CR2, value)

    def segment_base(self, name: str) -> int:
        """The base that a segment adds to an address."""
        return self._segment(name).base

    @property
    def linear_rip(self) -> int:
        """CS base + RIP."""
        return (self._segment("cs").base + self.rip) & (2**64 - 1)

    def skip(self, length: int) -> None:
        """Step over an instruction that has been emulated."""
        mask = {16: 0xFFFF, 32: 0xFFFFFFFF, 64: 2**64 - 1}[self.code_size()]
        self.rip = (self.rip + length) & mask

    @property
    def rip(self) -> int:
        """The instruction pointer."""
        return self._read_rip()

    @rip.setter
    def rip(self, value: int) -> None:
        self._engine.write(ux.UC_X86_REG_RIP, value)

    def read_system(self, sregs: uapi.kvm_sregs) -> None:
        """Bring ``sregs`` up to date with what the guest has changed without an intercept."""
        engine = self._engine
        for name, cache in self.segments().items():
            _fill_segment(getattr(sregs, name), cache)
        sregs.gdt.base, sregs.gdt.limit = engine.read_table_register(ux.UC_X86_REG_GDTR)
        sregs.idt.base, sregs.idt.limit = engine.read_table_register(ux.UC_X86_REG_IDTR)
        sregs.cr2 = engine.read(ux.UC_X86_REG_CR2)

    def segments(self) -> dict[str, SegmentCache]:
        """The six segment registers, hidden parts included."""
        self._now.save()
        return read_segments(self._now, _segment_offset())

    def _segment(self, name: str) -> SegmentCache:
        self._now.save()
        return read_segment(self._now, _segment_offset(), name)

    def code_size(self) -> int:
        """16, 32 or 64: how the bytes at CS:RIP are to be decoded."""
        attributes = self._segment("cs").attributes
        if attributes >> 9 & 1 and self.efer & EFER_LMA:
            return 64
        return 32 if attributes >> 10 & 1 else 16

    # -- running ------------------------------------------------------------------------------

    def run(self) -> Stop:
        """Execute until something stops it.  The GIL is free while guest code runs."""
        engine = self._engine
        while True:
            self._stop = None
            status = engine.start(self._read_rip())
            if not self._retranslate:
                break
            self._retranslate = False
            self._planted.plant()
            if self._stop is not None:
                break
        if self._stop is not None:
            return self._stop
        return Stop(StopKind.LOST, text=error_text(status)) if status else REQUESTED

    def step(self) -> Stop:
        """Execute one instruction, or one round of a repeated one: STEPPED if it has completed.

        If the guest is tracing itself, the trap that follows the instruction is its own and is an
        INTERCEPT: the instruction has completed then as well.
        """
        rflags = self.get("rflags")
        self.set("rflags", rflags | X86_EFLAGS_TF)
        stop = self.run()
        if not rflags & X86_EFLAGS_TF:
            self.set("rflags", self.get("rflags") & ~X86_EFLAGS_TF)
            if stop == TRAP:
                return STEPPED
        return stop

    def emulate(self, linear: int, code: bytes, operand: int, memory: EmulatedMemory) -> Stop:
        """See :meth:`~guestfault.softkvm.processor.Processor.emulate`."""
        engine, window = self._engine, self._window
        self._saved.save()
        window.begin(memory, operand)
        self._copies.begin(linear, code)
        engine.flush_tlb()
        hook = engine.hook_accesses(self._on_access)
        self._emulating = self._special = True
        try:
            stop = self.step()
            if stop is STEPPED or stop == TRAP:
                window.finish()
        finally:
            self._emulating = self._special = False
            engine.unhook(hook)
            engine.flush_tlb()
        if window.refused:
            stop = ABANDONED
        if stop is not STEPPED and stop != TRAP:
            self._saved.restore()
        return stop

    def unplant(self) -> None:
        """What is at RIP is not an instruction to stop on: let it run."""
        self._planted.remove(self.linear_rip)

    def stop(self) -> None:
        """From any thread: make :meth:`run` come back soon.  Lost if it has not begun yet."""
        self._engine.stop()

    # -- hooks: called on the running thread, in the middle of an instruction -------------------

    def _on_tlb_miss(self, gva: int, access: int) -> tuple[int, int] | None:
        if not self._special:
            answer = self._tlb_fill(gva, access)
            if answer is None:
                self._stop = REFUSED
            return answer
        if self._entering:
            if gva >> 12 == _ENTRY >> 12:
                return _PRIVATE + _CODE, unicorn.UC_PROT_ALL
            return None  # VMRUN has been executed and its guest wants its first instruction
        at = self._copies.page(gva) if access == _FETCH else self._window.page(gva)
        return None if at is None else (at, unicorn.UC_PROT_ALL)

    def _on_interrupt(self, number: int) -> None:
        self._stop = Stop(StopKind.INTERCEPT, number - _VMEXIT)
        self._engine.stop_here()

    def _on_new_block(self, address: int, size: int) -> None:
        if self._special:
            return
        code = self._fetch(address, size)
        if code is None:
            self._stop = REQUESTED  # to find out what is wrong with it
        elif not self._planted.look_through(code, address, self.code_size):
            return
        self._retranslate = True
        self._engine.stop_here()  # before the block runs

    def _on_planted(self) -> None:
        if self._emulating:
            return  # one that another instruction left behind
        self._stop = _PLANTED
        self._engine.stop_here()


@functools.cache
def _segment_offset() -> int:
    """Found once per process, on a processor made for it."""
    cpu = Cpu(Hooks(lambda *_: None, lambda *_: None))
    sregs = uapi.kvm_sregs()
    sregs.es.base = _SENTINEL
    sregs.cr0 = 0x10
    try:
        cpu.load(sregs)
        cpu._now.save()
        return find_offset(cpu._now.bytes_at(0, cpu._now.size), _SENTINEL)
    finally:
        cpu.close()


def _fill_segment(s: uapi.kvm_segment, cache: SegmentCache) -> None:
    s.selector, s.base, s.limit, attributes = cache
    s.type, s.s, s.dpl = attributes & 15, attributes >> 4 & 1, attributes >> 5 & 3
    s.present, s.avl, s.l = attributes >> 7 & 1, attributes >> 8 & 1, attributes >> 9 & 1
    s.db, s.g = attributes >> 10 & 1, attributes >> 11 & 1
    s.unusable = 1 - s.present
