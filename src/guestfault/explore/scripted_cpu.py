"""A processor that runs a script: the guest of a scenario, an instruction at a time.

It stands where the engine stands otherwise (:class:`guestfault.softkvm.processor.Processor`), so
that KVM's own code can be run thousands of times a second.  What it has of a processor is what KVM
can tell from outside: a TLB that is filled by asking and forgets only when told to, instructions
that are begun anew when an access is refused, and a stop that is honoured between instructions.

An :class:`Insn` is its machine code, in real mode with flat segments, and the accesses that it
makes, in order.  The code lies in guest memory as well: KVM decodes it from there whenever it
performs an instruction itself.

Guest memory is read and written through the model's page tables at the very moment of the access.
If the host has taken the page away by then, whoever handed out the translation should have taken
that back: :attr:`ScriptedCpu.violations` tells of each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from guestfault.explore.model_mm import ModelMm
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.processor import (
    ABANDONED,
    GPRS,
    REFUSED,
    REQUESTED,
    STEPPED,
    Access,
    EmulatedMemory,
    Hooks,
    Stop,
    StopKind,
)
from guestfault.softkvm.vmcb import INTERCEPT_EXCEPTION, SvmExit
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import UD_VECTOR, X86_EFLAGS_IF

__all__ = [
    "Asked",
    "Insn",
    "ScriptedCpu",
    "cli",
    "hlt",
    "inb",
    "int_",
    "iret",
    "load",
    "move",
    "outb",
    "pusha",
    "store",
    "ud2",
]

_PAGE_SIZE = 4096
_OFFSET = _PAGE_SIZE - 1
_RIGHTS = {Access.READ: 1, Access.WRITE: 2, Access.FETCH: 4}  # UC_PROT_READ, WRITE, EXEC
_READ, _WRITE, _FETCH = Access.READ, Access.WRITE, Access.FETCH
_PLANTED = Stop(StopKind.PLANTED)
_UD = Stop(StopKind.INTERCEPT, INTERCEPT_EXCEPTION + UD_VECTOR)
_HLT, _SWINT = Stop(StopKind.INTERCEPT, SvmExit.HLT), Stop(StopKind.INTERCEPT, SvmExit.SWINT)
_IN_VAIN = 8
_NUMBERS = {"rax": 0, "rcx": 1, "rdx": 2, "rbx": 3, "rbp": 5, "rsi": 6, "rdi": 7}
_MSRS = dict.fromkeys(
    (
        *("star", "lstar", "cstar", "sfmask", "kernel_gs_base"),
        *("sysenter_cs", "sysenter_esp", "sysenter_eip"),
    ),
    0,
)


class Asked(NamedTuple):
    """An access that the guest made: the linear address, which is the physical one too."""

    gpa: int
    size: int
    write: bool


class Operand(NamedTuple):
    """One access of an instruction; a write of ``data``, or of what was read before it."""

    gpa: int
    size: int
    write: bool = False
    data: bytes | None = None


class Insn(NamedTuple):
    """One instruction: its code, its accesses, and what it stops the processor with, if it does."""

    name: str
    code: bytes
    operands: tuple[Operand, ...] = ()
    stop: Stop | None = None
    next: int | None = None  # where it goes on, if not behind itself
    sp: int = 0  # what it adds to SP
    register: str = ""  # where what it reads goes
    interrupts: bool | None = None  # whether they are on from here


def load(register: str, gpa: int, size: int = 4) -> Insn:
    """Load from an address below 64 KiB: ``rax`` stands for AL, AX or EAX."""
    modrm = (_NUMBERS[register] << 3 | 6).to_bytes(1, "little")
    code = {1: b"\x8a", 2: b"\x8b", 4: b"\x66\x8b"}[size] + modrm + gpa.to_bytes(2, "little")
    return Insn(f"load {gpa:#x}", code, (Operand(gpa, size),), register=register)


def store(gpa: int, data: bytes) -> Insn:
    """Store one, two or four bytes."""
    code = {1: b"\xc6\x06", 2: b"\xc7\x06", 4: b"\x66\xc7\x06"}[len(data)]
    operand = Operand(gpa, len(data), True, data)
    return Insn(f"store {gpa:#x}", code + gpa.to_bytes(2, "little") + data, (operand,))


def move(src: int, dst: int, size: int = 4) -> Insn:
    """MOVS from DS:SI to ES:DI; put the two addresses into the registers beforehand."""
    code = {1: b"\xa4", 2: b"\xa5", 4: b"\x66\xa5"}[size]
    return Insn(f"move {src:#x} to {dst:#x}", code, (Operand(src, size), Operand(dst, size, True)))


def pusha(sp: int, values: Sequence[int]) -> Insn:
    """PUSHA: eight words from ``sp`` downwards, AX first; ``values`` as the registers are."""
    operands = []
    for value in values:
        sp = (sp - 2) & 0xFFFF
        operands.append(Operand(sp, 2, True, value.to_bytes(2, "little")))
    return Insn("pusha", b"\x60", tuple(operands), sp=-2 * len(operands))


def outb(port: int) -> Insn:
    """OUT imm8, AL."""
    return Insn(f"out {port:#x}", b"\xe6" + port.to_bytes(1, "little"), stop=_PLANTED)


def inb(port: int) -> Insn:
    """IN AL, imm8."""
    return Insn(f"in {port:#x}", b"\xe4" + port.to_bytes(1, "little"), stop=_PLANTED)


def int_(vector: int) -> Insn:
    """INT n."""
    return Insn(f"int {vector:#x}", b"\xcd" + vector.to_bytes(1, "little"), stop=_SWINT)


def hlt() -> Insn:
    """HLT."""
    return Insn("hlt", b"\xf4", stop=_HLT)


def ud2() -> Insn:
    """UD2: an invalid opcode."""
    return Insn("ud2", b"\x0f\x0b", stop=_UD)


def cli() -> Insn:
    """CLI."""
    return Insn("cli", b"\xfa", interrupts=False)


def iret(to: int) -> Insn:
    """IRET from a handler that has interrupted ``to``, where interrupts were on."""
    return Insn("iret", b"\xcf", next=to, sp=6, interrupts=True)


class ScriptedCpu:
    """See :class:`~guestfault.softkvm.processor.Processor`.

    ``program`` maps addresses to instructions.  :attr:`asked` is the access that missed the TLB
    last; what the guest has loaded is in its registers.  ``in_vain(vcpu_id, gpa)`` is told, once,
    of an access that has been refused :data:`_IN_VAIN` times on end since KVM_RUN began.
    """

    def __init__(
        self,
        hooks: Hooks,
        mm: ModelMm,
        vcpu_id: int,
        program: dict[int, Insn],
        in_vain: Callable[[int, int], None],
    ) -> None:
        self._tlb_fill = hooks.tlb_fill
        self._mm = mm
        self._program = program
        self._vcpu_id = vcpu_id
        self._in_vain = in_vain
        self._vain = 0
        self._touched = False  # memory, since the instruction began
        self._requests = "requests", vcpu_id
        self._tlb: dict[int, tuple[int, int]] = {}
        self._ram: list[tuple[int, int, int]] = []  # gpa, size, hva
        self._stop = False
        self._gprs = dict.fromkeys(GPRS, 0)
        self.efer = 0
        self.msrs = dict(_MSRS)
        self.cr2 = 0
        self.violations: list[str] = []
        self.asked: Asked | None = None

    # -- executing ---------------------------------------------------------------------------------

    def run(self) -> Stop:
        """See :meth:`.Processor.run`."""
        self._stop = False
        while True:
            stop = self.step()
            if stop is not STEPPED:
                return stop
            preemption_point("guest: between two instructions", self._requests, True)
            if self._stop:
                return REQUESTED

    def step(self) -> Stop:
        """See :meth:`.Processor.step`."""
        rip = self._gprs["rip"]
        insn = self._program.get(rip)
        if insn is None:
            return Stop(StopKind.LOST, text=f"no instruction at {rip:#x}")
        if insn.stop is not None:
            return insn.stop
        values: list[bytes] = []
        self._touched = False
        for operand in insn.operands:
            value = self._access(operand, values)
            if value is None:
                return REFUSED
            if not operand.write:
                values.append(value)
        self._complete(rip, insn, values)
        return STEPPED

    def emulate(self, linear: int, code: bytes, operand: int, memory: EmulatedMemory) -> Stop:
        """See :meth:`.Processor.emulate`."""
        insn = self._program.get(linear)
        if insn is None:
            return Stop(StopKind.LOST, text=f"no instruction at {linear:#x}")
        values: list[bytes] = []
        for gpa, size, write, data in insn.operands:
            self.asked = Asked(gpa, size, write)
            if write:
                if not memory.write(gpa, values[-1] if data is None else data):
                    return ABANDONED
                continue
            value = memory.read(gpa, size)
            if value is None:
                return ABANDONED
            values.append(value)
        self._complete(linear, insn, values)
        return STEPPED

    def _complete(self, rip: int, insn: Insn, values: list[bytes]) -> None:
        self._vain = 0
        gprs = self._gprs
        gprs["rip"] = rip + len(insn.code) if insn.next is None else insn.next
        if insn.sp:
            gprs["rsp"] = (gprs["rsp"] + insn.sp) & 0xFFFF
        if insn.interrupts is not None:
            gprs["rflags"] = gprs["rflags"] & ~X86_EFLAGS_IF | X86_EFLAGS_IF * insn.interrupts
        if insn.register:
            # A write to the lower half of a register clears the upper one, a smaller one does not.
            size = len(values[0])
            keep = 0 if size == 4 else gprs[insn.register] & ~((1 << 8 * size) - 1)
            gprs[insn.register] = keep | int.from_bytes(values[0], "little")

    def _access(self, operand: Operand, values: list[bytes]) -> bytes | None:
        gpa, size, write, data = operand
        kind = _WRITE if write else _READ
        if write and data is None:
            data = values[-1]
        if (gpa & _OFFSET) + size <= _PAGE_SIZE:
            page = self._translate(gpa, kind, size)
            return None if page is None else self._touch(page | gpa & _OFFSET, size, data)
        parts = b""
        while size > 0:
            n = min(size, _PAGE_SIZE - (gpa & _OFFSET))
            page = self._translate(gpa, kind, n)
            if page is None:
                return None
            part = self._touch(page | gpa & _OFFSET, n, data[:n] if write and data else None)
            if data is not None:
                data = data[n:]
            parts += part
            gpa, size = gpa + n, size - n
        return parts

    def _translate(self, gva: int, kind: Access, size: int) -> int | None:
        entry = self._tlb.get(gva & ~_OFFSET)
        if entry is None or not entry[1] & _RIGHTS[kind]:
            self.asked = Asked(gva, size, kind is _WRITE)
            self._mm.last_failure.pop(self._vcpu_id, None)
            if self._touched:  # else the point before the instruction is the last one
                preemption_point("guest: another TLB miss", self._requests, True)
            entry = self._tlb_fill(gva, kind)
            if entry is None:
                self._vain += 1
                if self._vain == _IN_VAIN:
                    self._in_vain(self._vcpu_id, gva)
                return None
            self._tlb[gva & ~_OFFSET] = entry
        return entry[0]

    def _touch(self, physical: int, size: int, data: bytes | None) -> bytes:
        hva = self._hva(physical)
        page = None if hva is None else self._mm.pages.get(hva & ~_OFFSET)
        if page is None or hva is None:
            self.violations.append(f"the guest accesses {physical:#x}, where no memory is")
            return bytes(size)
        preemption_point("guest: access", page.key, data is not None)
        self._touched = True
        if not page.is_mapped_for(data is not None):
            what = "writes" if data is not None else "reads"
            self.violations.append(f"the guest {what} {physical:#x}, which the host has taken away")
            return bytes(size)
        content, at = page.cached, hva & _OFFSET
        assert content is not None
        if data is None:
            return bytes(content[at : at + size])
        content[at : at + size] = data
        return data

    def _hva(self, gpa: int) -> int | None:
        for start, size, hva in self._ram:
            if start <= gpa < start + size:
                return hva + gpa - start
        return None

    def stop(self) -> None:
        """See :meth:`.Processor.stop`."""
        self._stop = True

    # -- memory ------------------------------------------------------------------------------------

    def map_ram(self, gpa: int, size: int, hva: int) -> None:
        """See :meth:`.Processor.map_ram`."""
        self._ram.append((gpa, size, hva))

    def unmap_ram(self, gpa: int, size: int) -> None:
        """See :meth:`.Processor.unmap_ram`."""
        self._ram = [ram for ram in self._ram if ram[:2] != (gpa, size)]

    def flush_tlb(self) -> None:
        """See :meth:`.Processor.flush_tlb`."""
        self._tlb.clear()

    def flush_code(self) -> None:
        """Nothing is translated ahead."""

    def begin(self) -> None:
        """Userspace is about to call KVM_RUN."""
        self.asked = None
        self._vain = 0

    # -- state -------------------------------------------------------------------------------------

    @property
    def rip(self) -> int:
        """The instruction pointer."""
        return self._gprs["rip"]

    @rip.setter
    def rip(self, value: int) -> None:
        self._gprs["rip"] = value

    @property
    def linear_rip(self) -> int:
        """The same: segments are flat."""
        return self._gprs["rip"]

    def load(self, sregs: uapi.kvm_sregs) -> None:
        """See :meth:`.Processor.load`."""
        self._tlb.clear()

    def read_system(self, sregs: uapi.kvm_sregs) -> None:
        """Nothing changes here without an intercept."""

    def named_gprs(self) -> dict[str, int]:
        """See :meth:`.Processor.named_gprs`."""
        return dict(self._gprs)

    def write_gprs(self, values: dict[str, int]) -> None:
        """See :meth:`.Processor.write_gprs`."""
        self._gprs.update(values)

    def get(self, name: str) -> int:
        """See :meth:`.Processor.get`."""
        return self._gprs[name]

    def set(self, name: str, value: int) -> None:
        """See :meth:`.Processor.set`."""
        self._gprs[name] = value

    def read_cs(self) -> int:
        """Real mode, and code at the beginning of memory."""
        return 0

    def read_rflags(self) -> int:
        """RFLAGS."""
        return self._gprs["rflags"]

    def set_cr2(self, value: int) -> None:
        """Write CR2."""
        self.cr2 = value

    def segment_base(self, name: str) -> int:
        """All are flat."""
        return 0

    def code_size(self) -> int:
        """Real mode."""
        return 16

    def skip(self, length: int) -> None:
        """See :meth:`.Processor.skip`."""
        self._gprs["rip"] += length

    def unplant(self) -> None:
        """Stops are part of the script."""

    def close(self) -> None:
        """Nothing to free."""
