"""Every locator of a vCPU, on real outcomes of the software KVM in two dialects."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from guestfault.dialect.interface import probe
from guestfault.fault.access import Access, AccessKind, FoundBy
from guestfault.fault.locate.chain import Locators
from guestfault.fault.locate.decode import DecodeLocator
from guestfault.fault.locate.host_view import HostView
from guestfault.fault.locate.poison import from_poison
from guestfault.fault.locate.residency import HostResidency
from guestfault.fault.outcome import (
    BareFault,
    Hlt,
    MemoryFault,
    Outcome,
    Poisoned,
    RamMmio,
    outcome,
)
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.slots import MemorySlot, SlotMap
from guestfault.memory.view import Protected
from guestfault.softkvm.system import SoftSystem
from guestfault.uapi import kvm as uapi

CODE, DATA = 0x1000, 0x3000
MOV_BX = bytes.fromhex("8b07f4")  # mov ax, [bx]; hlt


class Guest:
    """Four pages of RAM, all but the one at DATA let in, and a vCPU in real mode."""

    def __init__(self, dialect: str, stack: ExitStack) -> None:
        system = SoftSystem(dialect)
        stack.callback(system.close)
        self.ram = stack.enter_context(GuestRam(4 * PAGE_SIZE))
        self.view = Protected(self.ram)
        self.view.bring_in(0, DATA)
        self.slots = SlotMap()
        self.slots.add(MemorySlot(0, self.ram.size, self.ram.guest.address, 0))
        vm = system.create_vm()
        stack.callback(vm.close)
        vm.set_user_memory_region(0, 0, self.ram.size, self.ram.guest.address)
        self.vcpu = vm.create_vcpu(0)
        self.interface = probe(vm.check_extension)
        self.ram.bytes[CODE : CODE + len(MOV_BX)] = MOV_BX
        sregs = self.vcpu.get_sregs()
        sregs.cs.base = sregs.cs.selector = 0
        self.vcpu.set_sregs(sregs)
        self.vcpu.set_regs(uapi.kvm_regs(rip=CODE, rbx=DATA, rflags=2))
        residency = HostResidency()
        stack.callback(residency.close)
        self.decode = DecodeLocator(self.slots, HostView(self.slots, self.ram), residency)

    def run(self) -> Outcome:
        return outcome(self.vcpu.run(), self.vcpu.kvm_run, self.interface)


@pytest.fixture
def guest() -> Iterator[Callable[[str], Guest]]:
    with ExitStack() as stack:
        yield lambda dialect: Guest(dialect, stack)


def test_the_annotation_comes_first(guest: Callable[[str], Guest]) -> None:
    one = guest("seed")
    seen = one.run()
    assert isinstance(seen, MemoryFault)
    locators = Locators(one.vcpu, one.slots, one.decode, lambda: pytest.fail("not to be asked"))
    (access,) = locators.locate(seen)
    assert (access.found_by, access.gpa, access.certain) == (FoundBy.ANNOTATION, DATA, True)


def test_a_bare_failure_is_decoded_and_resolved(guest: Callable[[str], Guest]) -> None:
    one = guest("linux-6.8")
    locators = Locators(one.vcpu, one.slots, one.decode)
    seen = one.run()
    assert isinstance(seen, BareFault)
    (access,) = locators.locate(seen)
    assert (access.found_by, access.gpa, access.size) == (FoundBy.DECODE, DATA, 2)
    assert (access.kind, access.instruction) == (AccessKind.READ, "mov ax, [bx]")
    assert access.certain
    assert access.hva == one.ram.guest.address + DATA
    one.ram.bytes[DATA : DATA + 2] = b"\x34\x12"
    one.view.bring_in(DATA, PAGE_SIZE)
    seen = one.run()
    assert isinstance(seen, Hlt)
    assert one.vcpu.get_regs().rax == 0x1234
    assert locators.locate(seen) == ()


def test_the_tracepoint_is_believed_before_the_decoder(guest: Callable[[str], Guest]) -> None:
    one = guest("linux-6.8")
    seen = one.run()
    recorded = Access(DATA, 1, FoundBy.TRACEPOINT)
    answers = [None, recorded]
    locators = Locators(one.vcpu, one.slots, one.decode, answers.pop)
    assert locators.locate(seen) == (recorded,)
    (access,) = locators.locate(seen)
    assert access.found_by is FoundBy.DECODE


def test_mmio_on_ram_names_itself(guest: Callable[[str], Guest]) -> None:
    one = guest("seed")
    locators = Locators(one.vcpu, one.slots, one.decode)
    (access,) = locators.locate(RamMmio(DATA + 8, b"\1\2", 2, True))
    assert (access.found_by, access.gpa, access.size) == (FoundBy.MMIO, DATA + 8, 2)
    assert access.kind is AccessKind.WRITE


def test_of_a_broken_page_the_instruction_is_told_if_it_goes_there(
    guest: Callable[[str], Guest],
) -> None:
    one = guest("linux-6.8")
    assert isinstance(one.run(), BareFault)
    locators = Locators(one.vcpu, one.slots, one.decode, lambda: pytest.fail("not to be asked"))
    hva = one.ram.guest.address + DATA
    (access,) = locators.locate(Poisoned(hva, 12))
    assert (access.found_by, access.gpa, access.hva) == (FoundBy.SIGNAL, DATA, hva)
    assert (access.kind, access.size, access.instruction) == (AccessKind.READ, 2, "mov ax, [bx]")
    assert access.certain
    # A page that the instruction has nothing to do with, and one that nobody has accessed.
    for other in (Poisoned(hva - PAGE_SIZE, 12), Poisoned(hva, 12, action_required=False)):
        (access,) = locators.locate(other)
        assert access == from_poison(other, one.slots)
        assert access.instruction is None


def test_a_broken_page_is_where_the_slots_show_it() -> None:
    slots = SlotMap()
    slots.add(MemorySlot(0x10000, 4 * PAGE_SIZE, 0x7F0000000000, 3))
    access = from_poison(Poisoned(0x7F0000002000, 12), slots)
    assert (access.gpa, access.size, access.certain) == (0x12000, PAGE_SIZE, True)
    assert access.slot is not None
    assert access.slot.slot == 3
    # Of a huge page, the address is of the small page that was met, or of a byte in it.
    access = from_poison(Poisoned(0x7F0000002123, 21), slots)
    assert (access.gpa, access.hva) == (0x12000, 0x7F0000002000)
    elsewhere = from_poison(Poisoned(0x7F0000004000, 12), slots)
    assert (elsewhere.gpa, elsewhere.slot, elsewhere.hva) == (None, None, 0x7F0000004000)
