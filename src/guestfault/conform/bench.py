"""The machine that one case runs on: a VM with its memory, and a vCPU before its access.

Made for one case and closed after it, so that no case can see what another left behind.  Nothing of
ours touches the target's guest view: what is in it is written, and read, through the host view.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Callable
from dataclasses import asdict, replace

from guestfault.conform import places
from guestfault.conform.guests import Access, exception_stub, gate, loop, reporter
from guestfault.dialect.interface import MemoryFaultInterface, probe
from guestfault.guest.layout import Mode
from guestfault.kvm.protocols import System, Vcpu, Vm
from guestfault.kvm.system import KvmSystem
from guestfault.linux.mapping import Mapping as HostMapping
from guestfault.linux.memfd import Memfd
from guestfault.memory.ram import GuestRam
from guestfault.softkvm.system import SoftSystem
from guestfault.uapi import kvm as uapi
from guestfault.x86.entries import ADDRESS_MASK, PT_PRESENT_MASK
from guestfault.x86.registers import CR0_ET, X86_EFLAGS_FIXED, X86_EFLAGS_IOPL
from guestfault.x86.segments import FLAT_GDT, Segments
from guestfault.x86.tables import Mapping, PagingMode, TableBuilder

__all__ = ["STALE", "TARGET_SLOT", "UNION_SIZE", "Bench", "Target", "poison", "union_of"]

UNION_SIZE = 256
_UNION = uapi.kvm_run.mmio.offset
# No byte of it is 0 or 0xff, and no two neighbours are the same: what an exit writes shows.
POISON = bytes(0x41 + i * 37 % 97 for i in range(UNION_SIZE))
STALE = 0xDEAD
"""What exit_reason holds before a KVM_RUN: one that is still there was not written."""

_HEADER_SLOT, TARGET_SLOT, _TABLES_SLOT = 0, 1, 2
_EXCEPTIONS = 32


class Target:
    """The memory behind the target's slot: a memfd, mapped once for us and once for KVM.

    ``content`` is what the four pages hold, in the end: a condition may begin with less.
    """

    def __init__(self, content: bytes) -> None:
        self.content = content
        self.memfd = Memfd("conform-target", places.TARGET_SIZE)
        self.host = HostMapping.from_memfd(self.memfd)
        self.guest = HostMapping.from_memfd(self.memfd)
        # A huge page would make the neighbours of a page present along with it.
        self.host.no_hugepage()
        self.guest.no_hugepage()
        self.bytes = self.host.view()
        self._spare = HostMapping.anonymous(places.PAGE)

    def fresh_page(self) -> int:
        """The address of a copy of the page's content, for ``UFFDIO_COPY``."""
        self._spare.view()[:] = self.content[places.PAGE : 2 * places.PAGE]
        return self._spare.address

    def write(self, first: int, pages: int = 1) -> None:
        """Put the content of some pages into the host view."""
        part = slice(first * places.PAGE, (first + pages) * places.PAGE)
        self.bytes[part] = self.content[part]

    @property
    def the_page(self) -> int:
        """Where the page that the case is about lies in the guest view, as a host address."""
        return self.guest.address + places.PAGE

    def close(self) -> None:
        """Unmap.  The VM must be gone."""
        self._spare.close()
        self.guest.close()
        self.host.close()
        self.memfd.close()


class Bench:
    """A machine for an access in a mode.

    ``create_vm`` makes the VM, where a condition wants another than the ordinary one.  Nothing is
    in the target's slot until :meth:`set_target`.
    """

    def __init__(
        self,
        system: System,
        access: Access,
        mode: Mode,
        create_vm: Callable[[System], Vm] | None = None,
    ) -> None:
        self.system, self.access, self.mode = system, access, mode
        self._to_close = contextlib.ExitStack()
        with contextlib.ExitStack() as stack:
            self.vm = (create_vm or (lambda system: system.create_vm()))(system)
            self.is_real = isinstance(system, KvmSystem)
            self.interface = _interface(system, self.vm)
            ram = GuestRam(places.TABLES_END)
            stack.callback(ram.close)
            self._bytes = ram.bytes
            self._write_header()
            self.target = Target(self._target_content())
            stack.callback(self.target.close)
            stack.callback(self.vm.close)  # first of all when it ends
            self._set_slot(_HEADER_SLOT, 0, places.HEADER_END, ram.guest.address)
            tables = places.TABLES, places.TABLES_END - places.TABLES
            self._set_slot(_TABLES_SLOT, *tables, ram.guest.address + places.TABLES)
            self._to_close = stack.pop_all()

    # -- memory ------------------------------------------------------------------------------------

    def _write_header(self) -> None:
        mode, access = self.mode, self.access
        code, begin, end = loop(access, mode)
        self._begin, self._end = places.CODE + begin, places.CODE + end
        self._write(places.CODE, code)
        for vector in range(_EXCEPTIONS):
            at = places.STUBS + vector * places.STUB_SIZE
            self._write(at, exception_stub(mode, vector, vector == access.handler))
            self._write(*gate(mode, vector, at))
        for at in (places.SCRATCH, places.SCRATCH + 0x128):
            self._write(at, struct.pack("<I", places.SCRATCHED))
        self._write(places.GDT, FLAT_GDT)
        if mode.is_long:
            self._write(places.TSS, self._tss())
            self._write_tables()

    def _tss(self) -> bytes:
        tss = bytearray(102) + struct.pack("<H", 104)
        stack = self._stack() if self.access.handler else places.STACK
        struct.pack_into("<Q", tss, 4, self.gva(stack))  # RSP0
        return bytes(tss) + bytes(places.PORTS // 8) + b"\xff" * 8

    def _stack(self) -> int:
        if self.access.pushes:
            return self.access.at + self.mode.word_size
        return self.access.stack or places.STACK

    def _write_tables(self) -> None:
        user = self.mode.cpl == 3
        tables = TableBuilder(PagingMode.FOUR_LEVEL, places.TABLES)
        tables.map(Mapping(self.gva(0), 0, places.TABLES_END, user=user))
        tables.map(Mapping(places.WALKED, places.SCRATCH, places.PAGE, user=user))
        self._paging = tables.state
        self._write(places.TABLES, tables.image())
        # The table of the walked address, which a condition may keep from being there.
        directory = places.TABLES
        for shift in (39, 30):
            directory = self._entry(directory, places.WALKED >> shift) & ADDRESS_MASK
        at = directory + 8 * (places.WALKED >> 21 & 511)
        table = self._entry(directory, places.WALKED >> 21)
        self._table = bytes(self._bytes[table & ADDRESS_MASK :][: places.PAGE])
        if self.access.walked:
            self._write(at, struct.pack("<Q", table & ~ADDRESS_MASK | places.THE_PAGE))

    def _entry(self, table: int, index: int) -> int:
        at = table + 8 * (index & 511)
        entry = int.from_bytes(self._bytes[at : at + 8], "little")
        assert entry & PT_PRESENT_MASK
        return entry

    def _target_content(self) -> bytes:
        content = bytearray(places.TARGET_SIZE)
        if self.access.walked:
            content[places.PAGE : 2 * places.PAGE] = self._table
        elif self.access.fetches:
            code = reporter(self.mode)
            at = places.OPERAND - places.TARGET
            content[at : at + len(code)] = code
        else:
            at = self.access.at - places.TARGET
            content[at : at + 4] = places.CONTENT.to_bytes(4, "little")
            at = places.MARKED - places.TARGET
            content[at : at + 4] = places.MARK.to_bytes(4, "little")
        return bytes(content)

    def _write(self, gpa: int, data: bytes) -> None:
        self._bytes[gpa : gpa + len(data)] = data

    def word(self, gpa: int) -> int:
        """Four bytes of guest memory as the host view has them."""
        if places.TARGET <= gpa < places.TARGET + places.TARGET_SIZE:
            at = gpa - places.TARGET
            return int.from_bytes(self.target.bytes[at : at + 4], "little")
        return int.from_bytes(self._bytes[gpa : gpa + 4], "little")

    def gva(self, gpa: int) -> int:
        """The linear address of a guest physical one."""
        return gpa + places.GVA_OFFSET if self.mode.is_long else gpa

    # -- slots -------------------------------------------------------------------------------------

    def _set_slot(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        self.vm.set_user_memory_region(slot, gpa, size, hva, flags)

    def set_target(self, flags: int = 0) -> None:
        """Put the target's memory into its slot."""
        where = places.TARGET, places.TARGET_SIZE, self.target.guest.address
        self._set_slot(TARGET_SLOT, *where, flags)

    def remove_target(self) -> None:
        """Delete the target's slot."""
        self._set_slot(TARGET_SLOT, places.TARGET, 0, 0)

    def in_slot(self, gpa: int) -> bool:
        """Whether a gpa is memory, the target among it even where a case leaves its slot out."""
        return gpa < places.TABLES_END and gpa & -places.PAGE != places.DEVICE

    # -- vCPUs -------------------------------------------------------------------------------------

    def create_vcpu(self, vcpu_id: int = 0) -> Vcpu:
        """A vCPU that stands at the start of the code."""
        vcpu = self.vm.create_vcpu(vcpu_id)
        sregs = vcpu.get_sregs()
        if self.mode.is_long:
            segments = Segments.long_mode(self.mode.cpl)
            task = replace(segments.tr, base=self.gva(places.TSS), limit=len(self._tss()) - 1)
            segments = replace(segments, tr=replace(task, selector=0x40))
            state = self._paging
            sregs.cr0, sregs.cr3, sregs.cr4 = state.cr0, state.cr3, state.cr4
            sregs.efer = state.efer
            sregs.gdt.base, sregs.gdt.limit = self.gva(places.GDT), len(FLAT_GDT) - 1
            sregs.idt.base, sregs.idt.limit = self.gva(places.IDT), 16 * _EXCEPTIONS - 1
        else:
            segments, sregs.cr0 = Segments.real_mode(), CR0_ET
            sregs.idt.base, sregs.idt.limit = places.VECTORS, 0x3FF
        for name, fields in asdict(segments).items():
            setattr(sregs, name, uapi.kvm_segment(**fields))
        vcpu.set_sregs(sregs)
        vcpu.set_regs(self._registers())
        return vcpu

    def _registers(self) -> uapi.kvm_regs:
        access = self.access
        regs = uapi.kvm_regs(rip=self.gva(places.CODE), rax=places.STORED)
        regs.rsp = self.gva(places.STACK if access.handler and self.mode.cpl else self._stack())
        regs.rflags = X86_EFLAGS_FIXED | (X86_EFLAGS_IOPL if self.mode.cpl == 3 else 0)
        for name, value in access.registers.items():
            setattr(regs, name, value if name in access.plain else self.gva(value))
        return regs

    def place_of(self, rip: int) -> str:
        """Where the guest stands, relative to what matters: ``access``, ``after``, ``target``."""
        gpa = rip - (places.GVA_OFFSET if self.mode.is_long else 0)
        if self._begin <= gpa < self._end:
            return "access" if gpa == self._begin else f"access+{gpa - self._begin}"
        if self._end <= gpa < places.CODE + places.PAGE:
            return "after" if gpa == self._end else f"after+{gpa - self._end}"
        if places.STUBS <= gpa < places.STUBS + _EXCEPTIONS * places.STUB_SIZE:
            return f"handler of {(gpa - places.STUBS) // places.STUB_SIZE}"
        if places.TARGET <= gpa < places.TARGET + places.TARGET_SIZE:
            return "target" if gpa == places.OPERAND else f"target{gpa - places.OPERAND:+d}"
        return f"{rip:#x}"

    def abandon(self) -> None:
        """Leave everything as it is: a thread is inside, and will not come out."""
        self._to_close.pop_all()

    def close(self) -> None:
        """Release the VM, then its memory."""
        self._to_close.close()


def poison(vcpu: Vcpu) -> None:
    """Fill the exit's union, and exit_reason, with what no exit leaves there."""
    start = ctypes.addressof(vcpu.kvm_run) + _UNION
    ctypes.memmove(start, POISON, UNION_SIZE)
    vcpu.kvm_run.exit_reason = STALE


def union_of(vcpu: Vcpu) -> bytes:
    """The 256 bytes of the exit's union."""
    return bytes(vcpu.run_area[_UNION : _UNION + UNION_SIZE])


def _interface(system: System, vm: Vm) -> MemoryFaultInterface | None:
    # Not every version that was never merged can be told by its capabilities.
    if isinstance(system, SoftSystem):
        return system.dialect.interface
    return probe(vm.check_extension)
