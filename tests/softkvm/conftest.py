"""A small machine for guests of a few bytes, the same on the software KVM and on ``/dev/kvm``.

2 MiB of RAM at guest physical 0, mapped one to one; a page of device at :data:`Machine.DEVICE`,
where no slot is; page tables with one entry for each page, so that a test can change any of them. A
guest is a string of hexadecimal machine code and ends itself with ``OUT 0xf4, al`` (:data:`END`),
which works in every mode.

A test that takes ``start`` runs on both KVMs, and what it asserts holds on both; where the real one
differs for a reason of this host's, the test names the reason.  ``soft`` starts on the software KVM
only.
"""

from __future__ import annotations

import ctypes
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from typing import Any

import pytest
from tests.softkvm.modelled_mm import make  # noqa: F401  (a fixture)

from guestfault.dialect.interface import probe
from guestfault.errors import Unavailable
from guestfault.fault.outcome import Io, Mmio, Outcome, RamMmio, outcome
from guestfault.kvm import KvmSystem
from guestfault.kvm.protocols import System
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.softkvm.system import SoftSystem
from guestfault.uapi import kvm as uapi
from guestfault.x86.entries import PT_PRESENT_MASK
from guestfault.x86.registers import CR0_ET, CR4_OSFXSR
from guestfault.x86.segments import FLAT_GDT, Segments
from guestfault.x86.tables import Mapping, PagingMode, TableBuilder

REAL, LONG0, LONG3 = "real", "long-cpl0", "long-cpl3"
MODES = (REAL, LONG0, LONG3)


class Machine:
    """One VM and one vCPU at the start of ``code`` (hexadecimal) in a mode.

    ``regs`` are the general registers to begin with; ``flags`` the slot's.
    """

    RAM_SIZE = 2 << 20
    GDT, TSS, IDT, STACK, TABLES = 0x5000, 0x6000, 0x7000, 0xF000, 0x1_0000
    CODE, DATA = 0x8000, 0x4_0000
    DEVICE = 0x20_0000
    END_PORT = 0xF4
    END = "e6f4"  # out 0xf4, al
    PERMITTED = range(0x100)  # ports that the TSS lets CPL3 use

    def __init__(
        self,
        system: System,
        code: str,
        mode: str = LONG3,
        *,
        flags: int = 0,
        accessed: bool = True,
        irqchip: bool = False,
        sregs: Callable[[uapi.kvm_sregs], None] | None = None,
        **regs: int,
    ) -> None:
        self.mode = mode
        self.ram = GuestRam(self.RAM_SIZE)
        self.bytes = self.ram.bytes
        self.vm = system.create_vm()
        if irqchip:
            self.vm.create_irqchip()
        self.interface = probe(self.vm.check_extension)
        self.slot_flags = flags
        self.tables = TableBuilder(
            PagingMode.FOUR_LEVEL, self.TABLES, accessed=accessed, dirty=accessed
        )
        user = mode == LONG3
        self.tables.map(Mapping(0, 0, self.DEVICE, user=user))
        self.tables.map(Mapping(self.DEVICE, self.DEVICE, 2 * PAGE_SIZE, user=user))
        self.write(self.TABLES, self.tables.image())
        self.write(self.GDT, FLAT_GDT)
        bitmap = bytes(len(self.PERMITTED) // 8) + b"\xff" * 8
        tss = bytearray(102) + struct.pack("<H", 104) + bitmap
        struct.pack_into("<Q", tss, 4, self.STACK)  # RSP0
        struct.pack_into("<Q", tss, 36, self.STACK - 0x1000)  # IST1
        self.tss_limit = len(tss) - 1
        self.write(self.TSS, tss)
        self.write(self.CODE, bytes.fromhex(code))
        self.vm.set_user_memory_region(0, 0, self.RAM_SIZE, self.ram.guest.address, flags)
        self.vcpu = self.add_vcpu(0, sregs, **regs)

    def add_vcpu(
        self,
        vcpu_id: int,
        change: Callable[[uapi.kvm_sregs], None] | None = None,
        **regs: int,
    ) -> Any:
        """Another vCPU at the start of the code."""
        vcpu = self.vm.create_vcpu(vcpu_id)
        sregs = vcpu.get_sregs()
        if self.mode == REAL:
            segments, sregs.cr0 = Segments.real_mode(), CR0_ET
            segments = replace(segments, cs=replace(segments.cs, selector=0, base=0))
        else:
            segments = Segments.long_mode(3 if self.mode == LONG3 else 0)
            task = replace(segments.tr, base=self.TSS, limit=self.tss_limit, selector=0x40)
            segments = replace(segments, tr=task)
            state = self.tables.state
            sregs.cr0, sregs.cr3, sregs.cr4 = state.cr0, state.cr3, state.cr4 | CR4_OSFXSR
            sregs.efer = state.efer
        for name, fields in asdict(segments).items():
            setattr(sregs, name, uapi.kvm_segment(**fields))
        sregs.gdt.base, sregs.gdt.limit = self.GDT, len(FLAT_GDT) - 1
        sregs.idt.base, sregs.idt.limit = (0, 0x3FF) if self.mode == REAL else (self.IDT, 0xFFF)
        if change is not None:
            change(sregs)
        vcpu.set_sregs(sregs)
        rflags = 0x3002 if self.mode == LONG3 else 2
        vcpu.set_regs(
            uapi.kvm_regs(**{"rip": self.CODE, "rsp": self.STACK, "rflags": rflags} | regs)
        )
        return vcpu

    # -- memory ---------------------------------------------------------------------------------

    def write(self, gpa: int, data: bytes | bytearray) -> None:
        """Put bytes into the host view."""
        self.bytes[gpa : gpa + len(data)] = bytes(data)

    def word(self, gpa: int, size: int = 8) -> int:
        """A little-endian number in memory."""
        return int.from_bytes(self.bytes[gpa : gpa + size], "little")

    def entry_at(self, gva: int) -> int:
        """The gpa of the last-level entry that maps a linear address."""
        table = self.TABLES
        for shift in (39, 30, 21):
            table = self.word(table + (gva >> shift & 511) * 8) & 0x000F_FFFF_FFFF_F000
        return table + (gva >> 12 & 511) * 8

    def change_entry(self, gva: int, *, clear: int = PT_PRESENT_MASK, add: int = 0) -> None:
        """Clear and set bits of a page's entry."""
        at = self.entry_at(gva)
        self.write(at, struct.pack("<Q", self.word(at) & ~clear | add))

    def gate(self, vector: int, handler: int, *, ist: int = 0, kind: int = 0x8E) -> None:
        """An IDT entry, of long mode or real mode."""
        if self.mode == REAL:
            self.write(4 * vector, struct.pack("<HH", handler, 0))
            return
        gate = struct.pack(
            "<HHBBHI4x", handler & 0xFFFF, 0x08, ist, kind, handler >> 16 & 0xFFFF, handler >> 32
        )
        self.write(self.IDT + 16 * vector, gate)

    # -- running --------------------------------------------------------------------------------

    def run(self, vcpu: Any = None) -> Outcome:
        """One KVM_RUN."""
        vcpu = vcpu or self.vcpu
        in_ram = self.RAM_SIZE.__gt__
        return outcome(vcpu.run(), vcpu.kvm_run, self.interface, in_ram)

    def data(self, io: Io) -> bytes:
        """The data of a port I/O exit."""
        return bytes(self.vcpu.run_area[io.data_offset :][: io.size * io.count])

    def trace(self, *answers: bytes | int) -> list[tuple[Any, ...]]:
        """Run to the end; every access to a device: (what, where, bytes), answered in turn.

        An answer is what a read gets; ``0`` and such are shorthand for one byte repeated.
        """
        left = list(answers)

        def answer(size: int) -> bytes:
            given = left.pop(0)
            return given if isinstance(given, bytes) else bytes([given]) * size

        seen: list[tuple[Any, ...]] = []
        while True:
            match self.run():
                case Io(self.END_PORT, 1, 1, False):
                    assert not left, "nobody asked for these answers"
                    return seen
                case Io(port, size, count, True, offset):
                    for i in range(count):
                        data = answer(size)
                        self.vcpu.run_area[offset + i * size : offset + (i + 1) * size] = data
                        seen.append(("in", port, data))
                case Io(port, size, count, False) as io:
                    data = self.data(io)
                    seen += [("out", port, data[i * size :][:size]) for i in range(count)]
                case Mmio(gpa, data, _, True):
                    seen.append(("write", gpa, data))
                case Mmio(gpa, _, length, False):
                    data = answer(length)
                    self.vcpu.kvm_run.mmio.data[:length] = data
                    seen.append(("read", gpa, data))
                case RamMmio(gpa, data, length, is_write):
                    raise AssertionError(f"RAM at {gpa:#x}+{length} as MMIO, write {is_write}")
                case other:
                    seen.append(("stop", other))
                    return seen

    @property
    def regs(self) -> uapi.kvm_regs:
        """The general registers."""
        return self.vcpu.get_regs()

    def discard(self, gpa: int, size: int = PAGE_SIZE) -> None:
        """Take pages out of the guest view."""
        self.ram.guest.discard(gpa, size)

    def bring_in(self, gpa: int, size: int = PAGE_SIZE) -> None:
        """Let pages into the guest view."""
        assert self.ram.guest.populate_write(gpa, size) == 0

    def poison_union(self, byte: int = 0xA5) -> None:
        """Fill the exit's union with something that no exit leaves there."""
        run = self.vcpu.kvm_run
        start = uapi.kvm_run.mmio.offset
        ctypes.memset(ctypes.addressof(run) + start, byte, 256)

    def union(self) -> bytes:
        """The 256 bytes of the exit's union."""
        return bytes(self.vcpu.run_area[uapi.kvm_run.mmio.offset :][:256])

    def close(self) -> None:
        """Release all of it."""
        self.vm.close()
        self.ram.close()


Start = Callable[..., Machine]


ON_SHADOW_PAGES_TOO = ("test_guest_mmu", "test_exceptions", "test_internal_error", "test_vcpu")
"""Modules whose tests with ``soft`` hold without two-dimensional paging as well."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run them both ways, but for a test that is parametrised over ``tdp_enabled`` itself."""
    own = any(m.args[0] == "tdp_enabled" for m in metafunc.definition.iter_markers("parametrize"))
    if (
        not own
        and "soft" in metafunc.fixturenames
        and metafunc.module.__name__.endswith(ON_SHADOW_PAGES_TOO)
    ):
        metafunc.parametrize("tdp_enabled", [True, False], ids=["npt", "shadow"])


@pytest.fixture
def tdp_enabled() -> bool:
    """Whether ``soft`` starts with two-dimensional paging, unless it is told."""
    return True


@pytest.fixture(params=["softkvm", "softkvm, npt=0", "/dev/kvm"])
def system(request: pytest.FixtureRequest) -> Iterator[System]:
    """Each of the two KVMs, the software one with and without two-dimensional paging."""
    if request.param != "/dev/kvm":
        system: System = SoftSystem("seed", tdp_enabled=request.param == "softkvm")
    else:
        try:
            system = KvmSystem()
        except Unavailable as why:
            pytest.skip(f"needs /dev/kvm: {why}")
    yield system
    system.close()


@pytest.fixture
def start(system: System) -> Iterator[Start]:
    """``start(code, mode, **regs)``: a machine on each of the two KVMs."""
    machines: list[Machine] = []

    def start_(code: str, mode: str = LONG3, **options: Any) -> Machine:
        machines.append(Machine(system, code, mode, **options))
        return machines[-1]

    yield start_
    for machine in machines:
        machine.close()


@pytest.fixture
def soft(tdp_enabled: bool) -> Iterator[Start]:
    """The same on the software KVM alone; ``dialect`` and ``tdp_enabled`` choose which."""
    paging = tdp_enabled
    made: list[Any] = []

    def soft_(
        code: str = Machine.END,
        mode: str = LONG3,
        dialect: str = "seed",
        tdp_enabled: bool = paging,
        **options: Any,
    ):
        system = SoftSystem(dialect, tdp_enabled=tdp_enabled)
        made.append(system)
        machine = Machine(system, code, mode, **options)
        machine.interface = system.dialect.interface  # not every dialect can be recognised
        made.append(machine)
        return machine

    yield soft_
    for one in reversed(made):
        one.close()


@pytest.fixture
def is_soft(system: System) -> bool:
    """Which of the two it is."""
    return isinstance(system, SoftSystem)


class Background:
    """A call in another thread; :meth:`result` waits for it and gives or raises what it did."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self._outcome: tuple[Any, BaseException | None] = (None, None)
        self.thread = threading.Thread(target=self._call, args=(function, args), daemon=True)
        self.thread.start()

    def _call(self, function: Callable[..., Any], args: tuple[Any, ...]) -> None:
        try:
            self._outcome = function(*args), None
        except BaseException as e:
            self._outcome = None, e

    def is_running(self, after: float = 0.05) -> bool:
        """Whether it has not come back within that time."""
        self.thread.join(after)
        return self.thread.is_alive()

    def result(self, timeout: float = 20) -> Any:
        """What it returned; raises what it raised."""
        self.thread.join(timeout)
        assert not self.thread.is_alive(), "the thread never came back"
        value, error = self._outcome
        if error is not None:
            raise error
        return value


@pytest.fixture
def background() -> type[Background]:
    """``background(function, *args)`` calls it in another thread."""
    return Background


def wait_until(condition: Callable[[], bool], timeout: float = 10) -> None:
    """Wait for something that another thread brings about."""
    deadline = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.001)


@pytest.fixture
def until() -> Callable[..., None]:
    """:func:`wait_until`."""
    return wait_until
