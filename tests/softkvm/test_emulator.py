"""How an emulated instruction goes on and ends: what comes of the exits it has prepared."""

import pytest

from guestfault.fault.outcome import Hlt, InternalError, Io, MemoryFault, Mmio, Shutdown
from guestfault.softkvm.page_track import kvm_slot_page_track_add_page
from guestfault.uapi import kvm as uapi
from guestfault.uapi.mman import PROT_NONE

END = "e6f4"
DATA = 0x4_0000
DEVICE = 0x20_0000
WORDS = {"rax": 1, "rcx": 2, "rdx": 3, "rbx": 4, "rbp": 6, "rsi": 7, "rdi": 8}


def stack(base, limit=0xFFFF):
    def change(sregs):
        sregs.ss.base, sregs.ss.limit = base, limit

    return change


# -- PUSHA -----------------------------------------------------------------------------------------


def test_of_several_writes_to_a_device_only_the_last_comes_out(start):
    """PUSHA makes eight; the fragments of each are forgotten with the next."""
    machine = start("60" + END, "real", sregs=stack(DEVICE), rsp=0x100, **WORDS)
    assert machine.trace() == [("write", DEVICE + 0xF0, b"\x08\0")]  # DI
    assert machine.regs.rsp == 0xF0


def test_writes_to_memory_after_one_to_a_device_do_not_make_it_forgotten(start):
    machine = start("60" + END, "real", sregs=stack(DEVICE - 8), rsp=0x10, **WORDS)
    assert machine.trace() == [("write", DEVICE, b"\x04\0")]  # BX, the fourth
    pushed = machine.bytes[DEVICE - 8 : DEVICE]
    assert bytes(pushed) == b"\x08\0\x07\0\x06\0\x10\0"  # DI, SI, BP, SP as it was


def test_pushad(start):
    machine = start("6660" + END, "real", sregs=stack(DEVICE - 0x10), rsp=0x20, **WORDS)
    assert machine.trace() == [("write", DEVICE, b"\x04\0\0\0")]


def test_an_exception_takes_the_place_of_the_exit_that_was_prepared(start):
    """PUSHA with two writes to a device, and then no room on the stack.

    The guest gets #SS and userspace hears nothing, though kvm_run holds the exit
    (ZBNrWZQhMX8AHzWM@google.com).  Memory is above the device, for the handler's frame.
    """
    above = DEVICE + 0x1000
    machine = start("60", "real", sregs=stack(above - 4, limit=0xFFF), rsp=10, **WORDS)
    ram = machine.ram.guest.address
    machine.vm.set_user_memory_region(1, above, 0x1000, ram + DATA)
    machine.gate(12, 0x9000)
    machine.write(0x9000, bytes.fromhex("f4"))  # hlt
    machine.poison_union()
    assert machine.run() == Hlt()
    assert machine.word(DATA, 2) == machine.CODE  # the frame: IP of the PUSHA
    run = machine.vcpu.kvm_run
    assert (run.mmio.phys_addr, run.mmio.len, run.mmio.is_write) == (above - 4, 2, 1)
    assert bytes(run.mmio.data[:2]) == b"\x0a\0"  # SP as it was


# -- userspace between -----------------------------------------------------------------------------


def test_the_instruction_is_finished_wherever_userspace_has_moved_rip(start):
    """RIP is the emulator's until the read is complete: KVM_SET_REGS comes too early."""
    machine = start("8b07 90 90 90" + END, "long-cpl3", rdi=DEVICE)
    assert isinstance(machine.run(), Mmio)
    regs = machine.regs
    regs.rip = machine.CODE + 4
    machine.vcpu.set_regs(regs)
    machine.vcpu.kvm_run.immediate_exit = 1
    machine.vcpu.run()
    assert machine.regs.rip == machine.CODE + 2
    machine.vcpu.kvm_run.immediate_exit = 0
    assert machine.trace() == []


def test_the_instruction_is_finished_though_its_code_has_gone(start):
    machine = start("8b07" + END, "long-cpl3", rdi=DEVICE)
    assert isinstance(machine.run(), Mmio)
    machine.vcpu.kvm_run.mmio.data[:4] = b"\x01\x02\x03\x04"
    machine.ram.guest.protect(machine.CODE, 4096, PROT_NONE)
    machine.run()
    assert machine.regs.rip == machine.CODE + 2
    assert machine.regs.rax == 0x04030201


def test_code_that_changes_meanwhile_does_not_change_the_instruction(start):
    machine = start("8b07" + END, "long-cpl3", rdi=DEVICE)
    assert isinstance(machine.run(), Mmio)
    machine.vcpu.kvm_run.mmio.data[:4] = b"\x01\x02\x03\x04"
    machine.write(machine.CODE, bytes.fromhex("8b1f"))  # mov ebx, [rdi]
    assert machine.trace() == []
    assert (machine.regs.rax, machine.regs.rbx) == (0x04030201, 0)


def test_an_exit_is_counted_once_however_many_pieces_it_has(soft):
    machine = soft("0f1007" + END, rdi=DEVICE + 0xFFC)
    assert len(machine.trace(*[b"abcd", b"abcdefgh", b"abcd"])) == 3
    assert machine.vcpu.arch.stat.mmio_exits == 1


# -- what cannot be emulated -----------------------------------------------------------------------


def test_code_where_no_slot_is(start):
    machine = start("ffe7", "long-cpl0", rdi=DEVICE)
    stop = machine.run()
    assert isinstance(stop, InternalError)
    assert stop.suberror == uapi.KVM_INTERNAL_ERROR_EMULATION
    assert stop.instruction == b""
    assert machine.regs.rip == DEVICE


def test_what_a_user_cannot_have_emulated_is_an_invalid_opcode(soft):
    """handle_emulation_failure() tells userspace of CPL 0 only."""
    machine = soft("ffe7", "long-cpl3", rdi=DEVICE)
    machine.gate(6, 0x9000)
    machine.write(0x9000, bytes.fromhex(END))
    assert machine.trace() == []
    assert machine.word(machine.regs.rsp) == DEVICE


def test_the_invalid_opcode_comes_with_the_exit_too_unless_registers_are_set(soft):
    machine = soft("ffe7", "long-cpl0", rdi=DEVICE)
    machine.gate(6, 0x9000)
    machine.write(0x9000, bytes.fromhex(END))
    assert isinstance(machine.run(), InternalError)
    machine.vcpu.set_regs(machine.regs)
    assert isinstance(machine.run(), InternalError)
    assert machine.trace() == []
    assert machine.regs.rip == 0x9000


class Unfetchable:
    """The host's memory, but for a page that KVM cannot copy from."""

    def __init__(self, machine, gpa):
        self._mm, self._page = machine.vm.kvm.mm, machine.ram.guest.address + gpa
        machine.vm.kvm.mm = self

    def copy_from_user(self, hva, size):
        return None if hva & -4096 == self._page else self._mm.copy_from_user(hva, size)

    def __getattr__(self, name):
        return getattr(self._mm, name)


def test_code_that_kvm_cannot_fetch_though_the_processor_could(soft):
    machine = soft("90" + END, "long-cpl0", rdi=DEVICE)
    page = 0xA000
    machine.write(page, bytes.fromhex("8b07"))
    regs = machine.regs
    regs.rip = page
    machine.vcpu.set_regs(regs)
    assert isinstance(machine.run(), Mmio)  # it is in the processor's TLB now
    machine.vcpu.set_regs(regs)
    machine.run()
    machine.vcpu.set_regs(regs)
    Unfetchable(machine, page)
    stop = machine.run()
    assert isinstance(stop, InternalError)
    assert stop.instruction == b""


def test_an_instruction_in_two_pages_needs_both(start):
    code = bytes.fromhex("8b8700000000" + END)  # mov eax, [rdi + 0]
    page = 0xA000
    machine = start("90", "long-cpl3", rdi=DEVICE, rip=page - 3)
    machine.write(page - 3, code)
    assert machine.trace(b"\1\2\3\4") == [("read", DEVICE, b"\1\2\3\4")]
    machine = start("90", "long-cpl3", rdi=DEVICE, rip=page - 3)
    machine.write(page - 3, code)
    machine.ram.guest.protect(page, 4096, PROT_NONE)
    assert not isinstance(machine.run(), Mmio)


def test_an_instruction_that_ends_with_its_page_needs_the_next_one_not(soft):
    page = 0xA000
    machine = soft("90", rdi=DEVICE, rip=page - 2, flags=4)
    machine.write(page - 2, bytes.fromhex("8b07"))
    machine.bring_in(0, machine.RAM_SIZE)
    machine.discard(page)
    assert isinstance(machine.run(), Mmio)
    assert machine.run() == MemoryFault(page, 4096, 2, 14)


def test_enter_with_a_nesting_level(start):
    """One of the instructions that KVM's emulator knows and gives up."""
    machine = start("c8000003", "real", sregs=stack(DEVICE), rsp=0x100, rbp=0x80)
    assert isinstance(machine.run(), InternalError)


def test_an_exception_of_the_instruction_itself(start):
    machine = start("f737", "long-cpl3", rdi=DEVICE, rax=1)  # div dword [rdi]
    machine.gate(0, 0x9000)
    machine.write(0x9000, bytes.fromhex(END))
    assert machine.trace(bytes(4)) == [("read", DEVICE, bytes(4))]
    assert machine.regs.rip >> 12 == 9


# -- going on --------------------------------------------------------------------------------------


def test_a_repeated_instruction_goes_on_inside_the_emulator(soft):
    """1024 rounds at a time, without entering the guest."""
    machine = soft("f3aa" + END, rdi=DATA, rcx=2000, rax=0x5A)
    kvm = machine.vm.kvm
    with kvm.second_stage.mmu_lock:
        kvm_slot_page_track_add_page(kvm, kvm.memslots.slots[0], DATA >> 12)
    assert machine.trace() == []
    assert bytes(machine.bytes[DATA : DATA + 2001]) == b"\x5a" * 2000 + b"\0"
    assert machine.regs.rcx == 0
    assert machine.vcpu.arch.stat.exits < 10


def test_a_comparison_stops_where_it_differs(start):
    machine = start("f3a6" + END, "long-cpl3", rsi=DEVICE, rdi=DATA, rcx=3)
    machine.write(DATA, b"ab")
    seen = machine.trace(b"a", b"x")
    assert seen == [("read", DEVICE, b"a"), ("read", DEVICE + 1, b"x")]
    assert machine.regs.rcx == 1


@pytest.mark.parametrize(("code", "trapped"), [("8a07", True), ("8807", False)])
def test_the_trap_after_a_write_to_a_device_is_lost(soft, code, trapped):
    """The kernel's own FIXME: it returns to userspace and forgets the single step."""
    machine = soft(code + "90" + END, "long-cpl0", rdi=DEVICE, rbx=DATA, rflags=0x102)
    machine.gate(1, 0x9000)
    # pop rax; push rax; mov [rbx], rax; add rbx, 8; iretq
    machine.write(0x9000, bytes.fromhex("58 50 488903 4883c308 48cf"))
    assert len(machine.trace(*[b"\1"] * trapped)) == 1
    first = machine.CODE + (2 if trapped else 3)
    assert machine.word(DATA) == first


@pytest.mark.timeout(20)
def test_a_descriptor_that_cannot_be_read_is_no_exit_at_all(soft):
    """An access that cannot be a device's fails: KVM lets the guest try again, for ever.

    A load of DS from a device, with the GDT's page not to be had by a copy.
    """
    machine = soft("8e1f" + END, "long-cpl0", rdi=DEVICE)
    Unfetchable(machine, machine.GDT)
    assert isinstance(machine.run(), Mmio)
    machine.vcpu.kvm_run.mmio.data[:2] = b"\x10\0"
    machine.vcpu.kvm_run.immediate_exit = 1
    machine.vcpu.run()
    assert machine.regs.rip == machine.CODE  # neither past it nor anything prepared
    assert not machine.vcpu.arch.emulate_ctxt.mmio_needed
    machine.vcpu.kvm_run.immediate_exit = 0
    machine.vm.kvm.mm = machine.vm.kvm.mm._mm
    assert machine.trace(b"\x10\0") == [("read", DEVICE, b"\x10\0")]


def test_a_shutdown_takes_the_place_of_the_exit_too(soft):
    machine = soft("60", "real", sregs=stack(DEVICE, limit=0x7F), rsp=4)
    machine.gate(12, 0x9000)
    assert isinstance(machine.run(), InternalError | Shutdown)


def test_nothing_is_prepared_where_memory_will_do(soft):
    machine = soft("ff37 8f07" + END, rdi=DATA)
    kvm = machine.vm.kvm
    with kvm.second_stage.mmu_lock:
        kvm_slot_page_track_add_page(kvm, kvm.memslots.slots[0], DATA >> 12)
    machine.write(DATA, b"abcdefgh")
    assert isinstance(machine.run(), Io)
    assert machine.bytes[DATA : DATA + 8] == b"abcdefgh"
    assert machine.vcpu.arch.stat.mmio_exits == 0
