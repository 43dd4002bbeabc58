"""The processor of the software KVM: a Unicorn engine in SVM guest mode, with us as its MMU.

What it gives the rest of the room is one call, :meth:`Cpu.run`, that executes guest code until
something needs KVM, and says what: a :class:`Stop`.

- *Memory.*  Unicorn's TLB is in virtual mode: on every TLB miss it asks ``tlb_fill(gva, access)``
  and gets a guest physical address and rights, or a refusal, on which it stops with RIP on the
  instruction.  RAM is one ``mem_map_ptr`` per slot; everything above is a device window whose
  accesses come back as calls (:mod:`guestfault.softkvm.mmio`).
- *Privileged instructions* are SVM intercepts and exact: HLT, MSR and control register accesses,
  INVLPG, INT n and every exception arrive with RIP on the instruction.
- *Port I/O* is not: Unicorn runs IN and OUT without asking anyone and goes on inside the block.  So
  each newly translated block is looked through before it runs, and a stop is planted on the port
  instructions in it; SYSCALL and SYSENTER, which Unicorn skips, likewise.

Limits, which are Unicorn's: LOCK is atomic within one vCPU only, and code that one vCPU rewrites
under another's translation is not noticed until something flushes it.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import functools
import mmap
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import iced_x86
import unicorn
from unicorn import x86_const as ux
from unicorn.unicorn_py3.unicorn import Uc, UcError

from guestfault.softkvm.segment_cache import SegmentCache, find_offset, read_segments
from guestfault.softkvm.vmcb import VMCB_SIZE, fill_vmcb
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import EFER_LMA

__all__ = ["DEVICE_WINDOW", "MAX_PHYS", "Access", "Cpu", "Stop", "StopKind"]

MAX_PHYS = 1 << 46
"""Guest physical addresses lie below this."""
DEVICE_WINDOW = MAX_PHYS
"""Engine-physical address of the device window: an access at DEVICE_WINDOW + gpa is a call."""
_PRIVATE = DEVICE_WINDOW + MAX_PHYS
_CODE, _HSAVE, _VMCB, _BITMAPS = 0x0000, 0x1000, 0x2000, 0x3000
_PRIVATE_SIZE = 0x7000
_VMLOAD_VMRUN = bytes.fromhex("0f01da 0f01d8")
_ENTRY = 0x10000  # linear address of the entry code; nothing else is mapped while it runs

_MSR_EFER, _MSR_VM_HSAVE_PA = 0xC0000080, 0xC0010117
_EFER_SVME = 1 << 12
_NOWHERE = 1 << 63  # an address no instruction can have, for "run until"
_NOWHERE_LOOKUP = (_NOWHERE >> 12) - 1  # where Unicorn looks for a block that ends there
_VMEXIT = 0x100  # Unicorn reports a #VMEXIT as interrupt number 0x100 + code

# Bytes that a port instruction or SYSCALL/SYSENTER must contain; a block without them is clean.
_SUSPECT = re.compile(rb"[\x6c-\x6f\xe4-\xe7\xec-\xef]|\x0f[\x05\x34]")
_PLANTED = frozenset(
    getattr(iced_x86.Mnemonic, m)
    for m in ["IN", "OUT", "INSB", "INSW", "INSD", "OUTSB", "OUTSW", "OUTSD", "SYSCALL", "SYSENTER"]
)

GPRS: tuple[tuple[str, int], ...] = (
    *(
        (name, getattr(ux, f"UC_X86_REG_{name.upper()}"))
        for name in "rax rbx rcx rdx rsi rdi rsp rbp r8 r9 r10 r11 r12 r13 r14 r15 rip".split()
    ),
    ("rflags", ux.UC_X86_REG_EFLAGS),
)
_GPR_IDS = [reg for _, reg in GPRS]
_GPR_IDS_BY_NAME = dict(GPRS)
# What VMRUN does not load and leaving guest mode resets: carried over by hand.
_VECTOR_IDS = [ux.UC_X86_REG_YMM0 + i for i in range(16)] + [
    ux.UC_X86_REG_FPCW,
    ux.UC_X86_REG_FPSW,
    ux.UC_X86_REG_FPTAG,
    ux.UC_X86_REG_MXCSR,
    *(ux.UC_X86_REG_FP0 + i for i in range(8)),
]
_SENTINEL = 0x7A5C_93E1_0B4D_68F2  # a segment base that occurs nowhere else in a context


class Access(enum.IntEnum):
    """Why the TLB is asked; the numbers are Unicorn's."""

    READ = unicorn.UC_MEM_READ
    WRITE = unicorn.UC_MEM_WRITE
    FETCH = unicorn.UC_MEM_FETCH


class StopKind(enum.Enum):
    """What :meth:`Cpu.run` came back for."""

    REFUSED = enum.auto()  # tlb_fill said no
    INTERCEPT = enum.auto()  # a #VMEXIT; Stop.code is its number
    PLANTED = enum.auto()  # a port instruction, SYSCALL or SYSENTER is next
    REQUESTED = enum.auto()  # stop() was called, or the one step was made
    LOST = enum.auto()  # the engine gave up for a reason it did not give; Stop.text is its error


@dataclass(frozen=True, slots=True)
class Stop:
    """Why the processor stopped.  RIP is on the instruction that has not completed."""

    kind: StopKind
    code: int = 0
    text: str = ""


_REFUSED = Stop(StopKind.REFUSED)
_REQUESTED = Stop(StopKind.REQUESTED)
_PLANTED_STOP = Stop(StopKind.PLANTED)

TlbFill = Callable[[int, int], "tuple[int, int] | None"]
"""``(gva, access) -> (physical page, rights)``, or ``None`` to refuse."""


class Cpu:
    """One processor.  All methods but :meth:`stop` belong to the thread that runs it.

    ``tlb_fill`` is asked on a TLB miss.  ``fetch(linear, size)`` reads code bytes that are being
    translated.  ``device_read(gpa, size)`` and ``device_write(gpa, size, value)`` are the device
    window.
    """

    def __init__(
        self,
        tlb_fill: TlbFill,
        fetch: Callable[[int, int], bytes],
        device_read: Callable[[int, int], int],
        device_write: Callable[[int, int, int], None],
    ) -> None:
        self._tlb_fill = tlb_fill
        self._fetch = fetch
        # The model must be named for its SVM to be on.
        self._uc = uc = cast(Any, Uc)(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64, ux.UC_CPU_X86_EPYC)
        uc.ctl_set_tlb_mode(unicorn.UC_TLB_VIRTUAL)
        self._private = mmap.mmap(-1, _PRIVATE_SIZE)
        self._private[_CODE : _CODE + len(_VMLOAD_VMRUN)] = _VMLOAD_VMRUN
        self._private[_BITMAPS:_PRIVATE_SIZE] = b"\xff" * (_PRIVATE_SIZE - _BITMAPS)
        self._private_anchor = ctypes.c_char.from_buffer(self._private)
        uc.mem_map_ptr(
            _PRIVATE,
            _PRIVATE_SIZE,
            unicorn.UC_PROT_ALL,
            ctypes.addressof(self._private_anchor),
        )
        uc.mmio_map(
            DEVICE_WINDOW,
            MAX_PHYS,
            lambda _uc, offset, size, _data: device_read(offset, size),
            None,
            lambda _uc, offset, size, value, _data: device_write(offset, size, value),
            None,
        )
        uc.hook_add(unicorn.UC_HOOK_TLB_FILL, self._on_tlb_miss)
        uc.hook_add(unicorn.UC_HOOK_INTR, self._on_interrupt)
        uc.hook_add(unicorn.UC_HOOK_EDGE_GENERATED, self._on_new_block)
        uc.msr_write(_MSR_VM_HSAVE_PA, _PRIVATE + _HSAVE)
        uc.msr_write(_MSR_EFER, uc.msr_read(_MSR_EFER) | _EFER_SVME)
        self._outside = uc.context_save()
        self._entering = False
        self._quiet = False
        self._in_guest = False
        self._stop: Stop | None = None
        self._to_plant: list[int] = []
        self._planted: set[int] = set()
        self.efer = 0  # kept here: an MSR read in guest mode is an intercept, even from outside
        self._pass_over: int | None = None
        self.msrs = dict.fromkeys(
            (
                *("star", "lstar", "cstar", "sfmask", "kernel_gs_base"),
                *("sysenter_cs", "sysenter_esp", "sysenter_eip"),
            ),
            0,
        )

    # -- memory -------------------------------------------------------------------------------

    def map_ram(self, gpa: int, size: int, hva: int) -> None:
        """Put host memory at a guest physical address.  Rights are the TLB's business."""
        self._uc.mem_map_ptr(gpa, size, unicorn.UC_PROT_ALL, hva)

    def unmap_ram(self, gpa: int, size: int) -> None:
        """Take it away again."""
        self._uc.mem_unmap(gpa, size)

    def flush_tlb(self) -> None:
        """Forget every translation; the next access of each page asks again."""
        self._uc.ctl(unicorn.UC_CTL_TLB_FLUSH, unicorn.UC_CTL_IO_WRITE)

    def flush_code(self) -> None:
        """Forget translated code, because the bytes under it may have changed."""
        self._uc.ctl_flush_tb()

    # -- state --------------------------------------------------------------------------------

    def load(self, sregs: uapi.kvm_sregs) -> None:
        """Leave guest mode, if in it, and enter it again with these system registers.

        General, vector and x87 registers stay as they are.
        """
        uc = self._uc
        gprs = dict(zip((n for n, _ in GPRS), uc.reg_read_batch(_GPR_IDS), strict=True))
        vectors = uc.reg_read_batch(_VECTOR_IDS)
        uc.context_restore(self._outside)
        with memoryview(self._private) as private:
            fill_vmcb(
                private[_VMCB : _VMCB + VMCB_SIZE],
                sregs,
                rip=gprs["rip"] if self._in_guest else 0,
                rsp=gprs["rsp"],
                rax=gprs["rax"],
                rflags=gprs["rflags"],
                msrs=self.msrs,
                bitmaps=_PRIVATE + _BITMAPS,
            )
        uc.reg_write(ux.UC_X86_REG_RAX, _PRIVATE + _VMCB)
        self._entering = True
        with contextlib.suppress(UcError):  # it reports its own stop as an error
            uc.emu_start(_ENTRY, _NOWHERE, count=2)
        self._entering = False
        self._settle(_ENTRY)
        self._in_guest = True
        self.efer = sregs.efer
        self.flush_tlb()
        uc.reg_write_batch(
            [(reg, gprs[name]) for name, reg in GPRS] + list(zip(_VECTOR_IDS, vectors, strict=True))
        )
        uc.reg_write(ux.UC_X86_REG_CR2, sregs.cr2)

    def read_gprs(self) -> tuple[int, ...]:
        """The general registers, RIP and RFLAGS in the order of :data:`GPRS`."""
        return tuple(self._uc.reg_read_batch(_GPR_IDS))

    def named_gprs(self) -> dict[str, int]:
        """The same, by name."""
        return dict(zip(_GPR_IDS_BY_NAME, self.read_gprs(), strict=True))

    def write_gprs(self, values: dict[str, int]) -> None:
        """Write some of them, by name."""
        self._uc.reg_write_batch([(_GPR_IDS_BY_NAME[n], value) for n, value in values.items()])

    def get(self, name: str) -> int:
        """One general register, by name."""
        return int(self._uc.reg_read(_GPR_IDS_BY_NAME[name]))

    def set(self, name: str, value: int) -> None:
        """Write one general register, by name."""
        self._uc.reg_write(_GPR_IDS_BY_NAME[name], value)

    @property
    def cs_selector(self) -> int:
        """CS as the guest would read it; its low bits are the privilege level."""
        return int(self._uc.reg_read(ux.UC_X86_REG_CS))

    def set_cr2(self, value: int) -> None:
        """Write CR2."""
        self._uc.reg_write(ux.UC_X86_REG_CR2, value)

    def segment_base(self, name: str) -> int:
        """The base that a segment adds to an address."""
        return self.segments()[name].base

    @property
    def linear_rip(self) -> int:
        """CS base + RIP."""
        return self._linear(self.rip)

    def skip(self, length: int) -> None:
        """Step over an instruction that has been emulated."""
        mask = {16: 0xFFFF, 32: 0xFFFFFFFF, 64: 2**64 - 1}[self.code_size]
        self.rip = (self.rip + length) & mask

    @property
    def rip(self) -> int:
        """The instruction pointer."""
        return int(self._uc.reg_read(ux.UC_X86_REG_RIP))

    @rip.setter
    def rip(self, value: int) -> None:
        self._uc.reg_write(ux.UC_X86_REG_RIP, value)

    def read_system(self, sregs: uapi.kvm_sregs) -> None:
        """Bring ``sregs`` up to date with what the guest has changed without an intercept."""
        uc = self._uc
        caches = self.segments()
        for name, cache in caches.items():
            _fill_segment(getattr(sregs, name), cache)
        _, sregs.gdt.base, sregs.gdt.limit, _ = uc.reg_read(ux.UC_X86_REG_GDTR)
        _, sregs.idt.base, sregs.idt.limit, _ = uc.reg_read(ux.UC_X86_REG_IDTR)
        sregs.cr0 = uc.reg_read(ux.UC_X86_REG_CR0)
        sregs.cr2 = uc.reg_read(ux.UC_X86_REG_CR2)

    def segments(self) -> dict[str, SegmentCache]:
        """The six segment registers, hidden parts included."""
        return read_segments(self._uc, _segment_offset())

    # -- running ------------------------------------------------------------------------------

    def run(self, *, one_step: bool = False, pass_over_planted: bool = False) -> Stop:
        """Execute until something stops it.  The GIL is free while guest code runs.

        ``one_step`` executes a single instruction; ``pass_over_planted`` lets the instruction at
        RIP run although a stop is planted on it.
        """
        uc = self._uc
        while True:
            self._stop = None
            rip = uc.reg_read(ux.UC_X86_REG_RIP)
            self._pass_over = self._linear(rip) if pass_over_planted else None
            text = ""
            try:
                uc.emu_start(rip, _NOWHERE, count=1 if one_step else 0)
            except UcError as e:
                text = str(e)
            if one_step:
                self._settle(self.rip)
            if not self._to_plant:
                break
            self._plant()
        if self._stop is not None:
            return self._stop
        return Stop(StopKind.LOST, text=text) if text else _REQUESTED

    def save(self) -> Any:
        """The processor's whole state, for :meth:`restore`."""
        return self._uc.context_save()

    def restore(self, saved: Any) -> None:
        """Put the processor back to where it was."""
        self._uc.context_restore(saved)

    @contextlib.contextmanager
    def watching(self, on_access: Callable[[int, int], None]) -> Iterator[None]:
        """Call ``on_access(linear address, size)`` before each data access."""
        kinds = unicorn.UC_HOOK_MEM_READ | unicorn.UC_HOOK_MEM_WRITE
        hook = self._uc.hook_add(
            kinds, lambda _uc, _kind, address, size, _value, _data: on_access(address, size)
        )
        try:
            yield
        finally:
            self._uc.hook_del(hook)

    def _settle(self, rip: int) -> None:
        """Let Unicorn drop the blocks it counted steps in.

        It does so at the start of the next run that does not count, and looks their addresses up in
        the TLB again as it does: fetches that the guest never makes.
        """
        self._quiet = True
        with contextlib.suppress(UcError):
            self._uc.emu_start(rip, rip)
        self._quiet = False

    def stop(self) -> None:
        """From any thread: make :meth:`run` come back soon.  Lost if it has not begun yet."""
        self._uc.emu_stop()

    # -- hooks: called on the running thread, in the middle of an instruction -------------------

    def _on_tlb_miss(self, _uc: Any, gva: int, access: int, entry: Any, _data: Any) -> bool:
        if self._entering:
            # The entry code, and the block after VMRUN that is translated but not run.
            entry.paddr, entry.perms = _PRIVATE + _CODE, unicorn.UC_PROT_ALL
            return True
        if self._quiet or gva >> 12 == _NOWHERE_LOOKUP:
            return False
        answer = self._tlb_fill(gva, access)
        if answer is None:
            self._stop = _REFUSED
            return False
        entry.paddr, entry.perms = answer
        return True

    def _on_interrupt(self, uc: Any, number: int, _data: Any) -> None:
        self._stop = Stop(StopKind.INTERCEPT, number - _VMEXIT)
        uc.emu_stop()

    def _on_new_block(self, uc: Any, block: Any, _previous: Any, _data: Any) -> None:
        if self._entering:
            return
        code = self._fetch(block.pc, block.size)
        if not _SUSPECT.search(code):
            return
        decoder = iced_x86.Decoder(self.code_size, code, ip=block.pc)
        self._to_plant = [
            i.ip for i in decoder if i.mnemonic in _PLANTED and i.ip not in self._planted
        ]
        if self._to_plant:
            uc.emu_stop()  # before the block runs

    def _on_planted(self, uc: Any, address: int, _size: int, _data: Any) -> None:
        if address == self._pass_over:
            self._pass_over = None
            return
        self._stop = _PLANTED_STOP
        uc.emu_stop()

    def _plant(self) -> None:
        for address in self._to_plant:
            self._planted.add(address)
            self._uc.hook_add(unicorn.UC_HOOK_CODE, self._on_planted, None, address, address)
        self._to_plant = []
        self.flush_code()

    # -- what the guest's mode says about code ---------------------------------------------------

    @property
    def code_size(self) -> int:
        """16, 32 or 64: how the bytes at CS:RIP are to be decoded."""
        attributes = self.segments()["cs"].attributes
        if attributes >> 9 & 1 and self.efer & EFER_LMA:
            return 64
        return 32 if attributes >> 10 & 1 else 16

    def _linear(self, rip: int) -> int:
        return (self.segments()["cs"].base + rip) & (2**64 - 1)


@functools.cache
def _segment_offset() -> int:
    """Found once per process, on a processor made for it."""
    cpu = Cpu(lambda *_: None, lambda *_: b"", lambda *_: 0, lambda *_: None)
    sregs = uapi.kvm_sregs()
    sregs.es.base = _SENTINEL
    sregs.cr0 = 0x10
    cpu.load(sregs)
    return find_offset(bytes(cpu._uc.context_save()), _SENTINEL)


def _fill_segment(s: uapi.kvm_segment, cache: SegmentCache) -> None:
    s.selector, s.base, s.limit, attributes = cache
    s.type, s.s, s.dpl = attributes & 15, attributes >> 4 & 1, attributes >> 5 & 3
    s.present, s.avl, s.l = attributes >> 7 & 1, attributes >> 8 & 1, attributes >> 9 & 1
    s.db, s.g = attributes >> 10 & 1, attributes >> 11 & 1
    s.unusable = 1 - s.present
