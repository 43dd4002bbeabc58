"""A guest that makes one access to memory of any kind, on each KVM that this machine has.

Its code and page tables are in slot 0; it has no stack.  Slot 1 is the memory under test: whatever
host address range :meth:`Machine.back` is given.  The vCPU is at CPL3 in long mode, and a port
write after the access tells that it completed.
"""

from __future__ import annotations

import signal
import struct
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from guestfault.dialect.interface import probe
from guestfault.errors import Unavailable
from guestfault.fault.access import Access, AccessKind, FoundBy
from guestfault.fault.cause.why import causes
from guestfault.fault.outcome import Io, Outcome, outcome
from guestfault.kvm import KvmSystem
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.linux.sigbus import SigbusHeld, take_sigbus
from guestfault.linux.userfaultfd import Userfaultfd
from guestfault.memory.slots import MemorySlot, SlotMap
from guestfault.softkvm.system import SoftSystem
from guestfault.uapi import kvm as uapi

PAGE = 4096
HOME_SIZE = 64 << 10
PML4, PDPT, PD, READER, WRITER = 0x1000, 0x2000, 0x3000, 0x4000, 0x5000
TARGET = 2 << 20  # guest physical; the guest sees it at the same linear address
DONE_PORT = 0x10
USER_2M = 0x87  # present, writable, user, 2 MiB
READ_RBX = b"\x48\x8b\x03\xe6\x10"  # mov rax, [rbx]; out 0x10, al
WRITE_RBX = b"\x48\x89\x03\xe6\x10"  # mov [rbx], rax; out 0x10, al


class Machine:
    """A VM with one vCPU; :meth:`access` runs it until the access is made, or fails."""

    def __init__(self, system: Any, *kind: int, irqchip: bool = False) -> None:
        self.vm = system.create_vm(*kind)
        if irqchip:
            self.vm.create_irqchip()
        self.slots = SlotMap()
        self.home_file = Memfd("home", HOME_SIZE)
        self.home = Mapping.from_memfd(self.home_file)
        self.interface = probe(self.vm.check_extension)
        view = self.home.view()
        for at, data in (
            (PML4, struct.pack("<Q", PDPT | 7)),
            (PDPT, struct.pack("<Q", PD | 7)),
            (PD, struct.pack("<2Q", USER_2M, TARGET | USER_2M)),
            (READER, READ_RBX),
            (WRITER, WRITE_RBX),
        ):
            view[at : at + len(data)] = data
        self._set(MemorySlot(0, HOME_SIZE, self.home.address, 0))
        self.vcpu = self.vm.create_vcpu(0)
        self.vcpu.set_sregs(_user_mode(self.vcpu.get_sregs()))
        self.kind = AccessKind.READ
        self.gpa = TARGET

    def _set(self, slot: MemorySlot) -> None:
        self.vm.set_user_memory_region(slot.slot, slot.gpa, slot.size, slot.hva, slot.flags)
        self.slots.add(slot)

    def back(self, hva: int, size: int, flags: int = 0) -> None:
        """Make ``[hva, hva + size)`` the memory under test."""
        self._set(MemorySlot(TARGET, size, hva, 1, flags))

    def access(self, kind: AccessKind, offset: int = 0) -> Outcome:
        """Read or write 8 bytes at an offset of the memory under test."""
        self.prepare(kind, offset)
        return self.run()

    def prepare(self, kind: AccessKind, offset: int = 0) -> None:
        """Stand before that access."""
        self.kind, self.gpa = kind, TARGET + offset
        regs = uapi.kvm_regs(rip=WRITER if kind is AccessKind.WRITE else READER, rflags=0x3002)
        regs.rbx, regs.rax = self.gpa, 0x1122334455667788
        self.vcpu.set_regs(regs)

    def run(self) -> Outcome:
        in_slot = lambda gpa: self.slots.find(gpa) is not None  # noqa: E731
        return outcome(self.vcpu.run(), self.vcpu.kvm_run, self.interface, in_slot)

    def run_holding_sigbus(self) -> Outcome:
        """The same on a thread that is prepared for broken memory."""
        self.vcpu.set_interrupting_signals({signal.SIGBUS})
        with SigbusHeld():
            ret = self.vcpu.run()
            return outcome(ret, self.vcpu.kvm_run, self.interface, sigbus=take_sigbus())

    def completes(self) -> bool:
        """Run on: whether the access succeeds now, so that the port write is reached."""
        match self.run():
            case Io(port=0x10):
                return True
        return False

    @property
    def failed(self) -> Access:
        """The last access, as a locator would name it."""
        slot = self.slots.find(self.gpa)
        assert slot is not None
        hva = slot.hva_of(self.gpa)
        return Access(self.gpa, 8, FoundBy.DECODE, self.gpa, hva, slot, self.kind)

    def causes(self, failure: Any, **more: Any) -> tuple[Any, ...]:
        return causes(self.failed, failure, **more)

    def close(self) -> None:
        self.vm.close()
        self.home.close()
        self.home_file.close()


def _user_mode(sregs: uapi.kvm_sregs) -> uapi.kvm_sregs:
    sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer = 0x8000_0033, PML4, 0x20, 0x500
    for name in ("cs", "ds", "es", "fs", "gs", "ss"):
        segment, is_code = getattr(sregs, name), name == "cs"
        segment.base, segment.limit, segment.selector = 0, 0xFFFF_FFFF, 0x1B if is_code else 0x23
        segment.type, segment.s, segment.present = 11 if is_code else 3, 1, 1
        segment.dpl, segment.g, segment.l, segment.db = 3, 1, is_code, not is_code
    sregs.tr.type, sregs.tr.present, sregs.tr.s, sregs.tr.selector = 11, 1, 0, 0x28
    return sregs


def open_system(name: str) -> Any:
    if name.startswith("softkvm"):
        return SoftSystem(name.partition(" ")[2] or "linux-6.8")
    try:
        return KvmSystem()
    except Unavailable as error:
        pytest.skip(f"no usable /dev/kvm: {error}")


@pytest.fixture(params=["softkvm", "/dev/kvm"])
def kvm(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    open_system(name).close()
    return name


@pytest.fixture
def machine(kvm: str) -> Iterator[Machine]:
    system = open_system(kvm)
    machine = Machine(system)
    yield machine
    machine.close()
    system.close()


@pytest.fixture
def real_machine() -> Iterator[Machine]:
    system = open_system("/dev/kvm")
    machine = Machine(system)
    yield machine
    machine.close()
    system.close()


@pytest.fixture(params=["softkvm linux-7.3", "/dev/kvm"])
def machine_with_guest_memfd(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """One whose ordinary memory can be in a guest_memfd."""
    system = open_system(request.param)
    machine = Machine(system)
    yield machine
    machine.close()
    system.close()


@pytest.fixture(params=["softkvm linux-6.8", "softkvm linux-7.3", "/dev/kvm"])
def protected_machine(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """One whose memory can be private."""
    yield from _protected(request.param)


@pytest.fixture(params=["softkvm linux-7.3", "/dev/kvm"])
def protected_machine_with_irqchip(request: pytest.FixtureRequest) -> Iterator[Machine]:
    """The same with interrupt controllers in the kernel: page faults can be asynchronous."""
    yield from _protected(request.param, irqchip=True)


def _protected(name: str, *, irqchip: bool = False) -> Iterator[Machine]:
    system = open_system(name)
    kind = uapi.KVM_X86_SW_PROTECTED_VM
    if not system.check_extension(uapi.KVM_CAP_VM_TYPES) >> kind & 1:
        system.close()
        pytest.skip("needs KVM_X86_SW_PROTECTED_VM: scripts/sw-protected-kernel.sh builds a kernel")
    machine = Machine(system, kind, irqchip=irqchip)
    yield machine
    machine.close()
    system.close()


@pytest.fixture
def ram() -> Iterator[SimpleNamespace]:
    """16 pages of a memfd, mapped twice; ``guest`` is for the slot, ``host`` for us."""
    with (
        Memfd("test-ram", 16 * PAGE) as file,
        Mapping.from_memfd(file) as host,
        Mapping.from_memfd(file) as guest,
    ):
        guest.no_hugepage()
        yield SimpleNamespace(file=file, host=host, guest=guest, size=16 * PAGE)


@pytest.fixture
def open_uffd() -> Iterator[Callable[..., Userfaultfd]]:
    opened: list[Userfaultfd] = []

    def open_(required: int) -> Userfaultfd:
        try:
            uffd = Userfaultfd.open(required=required)
        except Unavailable as error:
            pytest.skip(f"needs userfaultfd: {error}")
        opened.append(uffd)
        return uffd

    yield open_
    for uffd in opened:
        uffd.close()
