"""The machine of the accuracy experiment: one vCPU, one instruction, pages absent at will.

Eight MiB of RAM mapped one to one, in long mode through 4 KiB pages, with descriptor tables, a task
state, an interrupt table and page tables in pages of their own.  On the software KVM a page is
absent when it is not populated and the slot asks for an exit, which names the page: the truth.  On
``/dev/kvm`` it is ``PROT_NONE``, and the truth is that we made it so.
"""

from __future__ import annotations

import fcntl
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import instruction_forms as forms
from guestfault.dialect.interface import probe
from guestfault.fault.access import Access
from guestfault.fault.locate.decode import DecodeLocator
from guestfault.fault.locate.host_view import HostView
from guestfault.fault.locate.residency import HostResidency
from guestfault.fault.outcome import Outcome, outcome
from guestfault.kvm.protocols import System
from guestfault.kvm.system import KvmSystem
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.slots import MemorySlot, SlotMap
from guestfault.memory.view import GuestView, Protected, Unpopulated
from guestfault.softkvm.system import SoftSystem
from guestfault.uapi import kvm as uapi
from guestfault.uapi.mman import PROT_NONE
from guestfault.x86.registers import CR0_ET, CR4_OSFXSR, CR4_OSXSAVE
from guestfault.x86.segments import FLAT_GDT, Segments, real_mode_segment
from guestfault.x86.state import GPR_NAMES
from guestfault.x86.tables import Mapping, PagingMode, TableBuilder
from instruction_forms import Form

__all__ = ["RAM_SIZE", "Machine", "open_machines"]

RAM_SIZE = 8 << 20
TABLES = 0x70_0000
EXIT_ON_MISSING = 1 << 2  # KVM_MEM_ABSENT_MAPPING_FAULT of the seed dialect
RSP0, IST1 = 0x4C_0F00, 0x4D_0F00
_PATIENCE = 1.0

# FLAT_GDT ends at 0x38; then an LDT at 0x40, data that is not accessed yet at 0x50, a TSS at 0x60.
_GDT = FLAT_GDT + struct.pack(
    "<7Q",
    0,
    0x0000_8200_0000_00FF | forms.LDT << 16,
    0,
    0x00CF_F200_0000_FFFF,
    0,
    0x0000_8900_0000_0067 | (forms.TSS & 0xFF_FFFF) << 16,
    0,
)


class Machine:
    """One vCPU of ``system``; use one :class:`Form` at a time."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.is_soft = isinstance(system, SoftSystem)
        self.ram = GuestRam(RAM_SIZE, name="accuracy")
        self.view: GuestView = Unpopulated(self.ram) if self.is_soft else Protected(self.ram)
        self.view.bring_in(0, RAM_SIZE)
        flags = EXIT_ON_MISSING if self.is_soft else 0
        self.slots = SlotMap()
        self.slots.add(MemorySlot(0, RAM_SIZE, self.ram.guest.address, 0, flags))
        self.vm = system.create_vm()
        self.vm.set_user_memory_region(0, 0, RAM_SIZE, self.ram.guest.address, flags)
        self.vcpu = self.vm.create_vcpu(0)
        self.interface = probe(self.vm.check_extension)
        self.has_avx = not self.is_soft and _enable_avx(self.vcpu)
        self._fresh_sregs = self.vcpu.get_sregs()
        self.absent: set[int] = set()
        self._pristine = b""
        residency = HostResidency(
            exit_on_missing=EXIT_ON_MISSING if self.is_soft else 0, registered=False
        )
        self._residency = residency
        #: As a pager asks, which knows what it has brought in, and as another VMM would.
        self.locators = {
            "content trusted": DecodeLocator(self.slots, HostView(self.slots, self.ram), residency),
            "content known to be absent": DecodeLocator(
                self.slots,
                HostView(self.slots, self.ram, lambda at: at // PAGE_SIZE not in self.absent),
                residency,
            ),
        }
        self._started = 0.0
        self._closing = threading.Event()
        self._watchdog = threading.Thread(target=self._watch, daemon=True)
        self._watchdog.start()

    # -- a form and its world ---------------------------------------------------------------------

    def load(self, form: Form, ring: int) -> None:
        """Put the form's world into memory, all of it present."""
        self.form, self.ring = form, ring
        image = bytearray(RAM_SIZE)

        def put(at: int, data: bytes) -> None:
            image[at : at + len(data)] = data

        target = forms.TARGETS[form.bits]
        stack = dict(_registers(form))["rsp"]
        if form.bits == 64:
            put(stack, struct.pack("<32Q", *[target] * 32))
            put(TABLES, _TABLES.image())
            put(forms.GDT, _GDT)
            put(forms.TSS, _tss())
            gates = [forms.gate(target, 8, int(vector == 0x22)) for vector in range(256)]
            put(forms.IDT, b"".join(gates))
        else:
            put(stack, struct.pack("<64H", *[target] * 64))
            put(forms.REAL_IDT, struct.pack("<HH", target, 0) * 256)
        put(0, b"\xf4" * 16)
        put(target, b"\xf4" * 16)
        put(form.start, form.before + form.bytes + b"\xf4")
        for at, data in form.store.items():
            put(at, data)
        self._pristine = bytes(image)
        # Taking everything out makes the software KVM forget what it has translated.
        self.take_out(0, RAM_SIZE // PAGE_SIZE)
        self.ram.bytes[:] = self._pristine
        self.all_in()

    def all_in(self) -> None:
        """Let every page in."""
        self.view.bring_in(0, RAM_SIZE)
        self.absent.clear()

    def let_in(self, page: int) -> None:
        """Let one page in."""
        self.view.bring_in(page * PAGE_SIZE, PAGE_SIZE)
        self.absent.discard(page)

    def take_out(self, page: int, count: int = 1) -> None:
        """Make pages absent; their content stays in the host view."""
        at, size = page * PAGE_SIZE, count * PAGE_SIZE
        if self.is_soft:
            self.ram.guest.discard(at, size)
        else:
            self.ram.guest.protect(at, size, PROT_NONE)
        self.absent.update(range(page, page + count))

    def restore(self, pages: set[int]) -> None:
        """Give pages the content that they had."""
        for page in pages:
            at, end = page * PAGE_SIZE, (page + 1) * PAGE_SIZE
            self.ram.bytes[at:end] = self._pristine[at:end]

    def rewind(self) -> None:
        """Put the vCPU before the form."""
        regs, sregs = entry(self.form, self.ring, self._fresh_sregs, avx=self.has_avx)
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(regs)

    def run(self) -> Outcome:
        """One ``KVM_RUN``, kicked out if it takes too long."""
        self._started = time.monotonic()
        ret = self.vcpu.run()
        self._started = 0.0
        return outcome(ret, self.vcpu.kvm_run, self.interface, lambda gpa: gpa < RAM_SIZE)

    def finish_io(self) -> None:
        """Complete an I/O exit that is pending, so that it does not meet the next form."""
        self.vcpu.kvm_run.immediate_exit = 1
        self.vcpu.run()
        self.vcpu.kvm_run.immediate_exit = 0

    def stands_on_form(self) -> bool:
        """Whether the vCPU was stopped by the form, and not before or after it."""
        return bool(self.vcpu.get_regs().rip == self.form.rip)

    def ask(self, how: str) -> tuple[Access, ...]:
        """The decode locator's answer, as if the failure had been bare."""
        return self.locators[how].locate(self.vcpu.get_regs(), self.vcpu.get_sregs())

    def _watch(self) -> None:
        while not self._closing.wait(_PATIENCE / 4):
            started = self._started
            if started and time.monotonic() - started > _PATIENCE:
                self.vcpu.kick()

    def close(self) -> None:
        """Give everything back."""
        self._closing.set()
        self._watchdog.join()
        self._residency.close()
        self.vm.close()
        self.view.close()
        self.ram.close()


def entry(
    form: Form, ring: int, fresh: uapi.kvm_sregs, *, avx: bool = False
) -> tuple[uapi.kvm_regs, uapi.kvm_sregs]:
    """The registers with which a form begins."""
    values = dict(_registers(form))
    regs = uapi.kvm_regs(rip=form.start, rflags=2)
    for name in (*GPR_NAMES, "rflags"):
        if name in values:
            setattr(regs, name, values[name])
    sregs = uapi.kvm_sregs.from_buffer_copy(fresh)
    if form.bits == 64:
        segments = Segments.long_mode(ring)
        for name, base in (("fs", "fs_base"), ("gs", "gs_base")):
            old = getattr(segments, name)
            segments = replace(segments, **{name: replace(old, base=values.get(base, 0))})
        segments = replace(segments, tr=replace(segments.tr, base=forms.TSS, selector=0x60))
        paging = _TABLES.state
        sregs.cr0, sregs.cr3, sregs.efer = paging.cr0, paging.cr3, paging.efer
        sregs.cr4 = paging.cr4 | CR4_OSFXSR | (CR4_OSXSAVE if avx else 0)
        sregs.gdt.base, sregs.gdt.limit = forms.GDT, len(_GDT) - 1
        sregs.idt.base, sregs.idt.limit = forms.IDT, 0xFFF if form.idt else 0
    else:
        segments = Segments.real_mode()
        for name in ("ds", "es", "ss"):
            segments = replace(segments, **{name: real_mode_segment(values.get(name, 0))})
        sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = CR0_ET, 0, CR4_OSFXSR, 0
        sregs.gdt.base = sregs.gdt.limit = 0
        sregs.idt.base, sregs.idt.limit = forms.REAL_IDT, 0x3FF if form.idt else 0
    for name, fields in asdict(segments).items():
        setattr(sregs, name, uapi.kvm_segment(**fields))
    return regs, sregs


def _registers(form: Form) -> list[tuple[str, int]]:
    first, step = (0x1040, 0x800) if form.bits == 16 else (0x20_0340, 0x1_0000)
    usual = [(name, first + step * n) for n, name in enumerate(GPR_NAMES)]
    if form.bits == 16:
        usual = usual[:8]
    return [*usual, *form.set.items()]


def _one_to_one() -> TableBuilder:
    tables = TableBuilder(PagingMode.FOUR_LEVEL, first_table=TABLES)
    tables.map(Mapping(0, 0, RAM_SIZE, user=True))
    return tables


_TABLES = _one_to_one()


def _tss() -> bytes:
    data = bytearray(0x68)
    struct.pack_into("<Q", data, 4, RSP0)
    struct.pack_into("<Q", data, 0x24, IST1)
    struct.pack_into("<H", data, 0x66, 0x68)
    return bytes(data)


_KVM_SET_XCRS = 0x4188AEA7  # _IOW(KVMIO, 0xa7, struct kvm_xcrs)


def _enable_avx(vcpu: Any) -> bool:
    """Set XCR0 for x87, SSE, AVX and, where it can be had, AVX-512."""
    for xcr0 in (0xE7, 0x7):
        xcrs = struct.pack("<IIIIQ", 1, 0, 0, 0, xcr0).ljust(392, b"\0")
        try:
            fcntl.ioctl(vcpu._fd, _KVM_SET_XCRS, xcrs)
        except OSError:
            continue
        return True
    return False


def open_machines(which: str) -> list[Callable[[], Machine]]:
    """What makes each machine that was asked for: ``soft``, ``kvm`` or ``all``."""
    makers: list[Callable[[], Machine]] = []
    if which in ("soft", "all"):
        makers.append(lambda: Machine(SoftSystem("seed")))
    if which in ("kvm", "all"):
        makers.append(lambda: Machine(KvmSystem()))
    return makers
