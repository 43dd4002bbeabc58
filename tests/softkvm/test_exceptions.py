"""Exceptions through the guest's IDT: frames, stacks, combinations, absent memory on the way."""

import struct

import pytest

from guestfault.fault.outcome import InternalError, MemoryFault, Shutdown
from guestfault.x86.registers import (
    DE_VECTOR,
    DF_VECTOR,
    GP_VECTOR,
    NP_VECTOR,
    PF_VECTOR,
    UD_VECTOR,
    X86_EFLAGS_IF,
)

END = "e6f4"
HANDLER = 0x9000
DATA = 0x4_0000
UNMAPPED = 0x7000_0000


def frame(machine, words):
    return struct.unpack(f"<{words}Q", machine.bytes[machine.regs.rsp :][: 8 * words])


def handled(machine, vector, **gate):
    machine.gate(vector, HANDLER, **gate)
    machine.write(HANDLER, bytes.fromhex(END))
    assert machine.trace() == []
    assert machine.regs.rip == HANDLER + 2 or machine.regs.rip == HANDLER


def test_undefined_instruction_at_cpl0(start):
    machine = start("0f0b", "long-cpl0")
    rsp = machine.regs.rsp
    handled(machine, UD_VECTOR)
    rip, cs, rflags, old_rsp, ss = frame(machine, 5)
    assert (rip, cs, old_rsp, ss) == (machine.CODE, 8, rsp, 0x10)
    assert rflags & 2


def test_division_by_zero_at_cpl0(start):
    machine = start("f7f1", "long-cpl0", rcx=0)
    handled(machine, DE_VECTOR)
    assert frame(machine, 1) == (machine.CODE,)


def test_page_fault_says_where_and_why(soft):
    machine = soft("488907", "long-cpl3", rdi=UNMAPPED)
    handled(machine, PF_VECTOR)
    error_code, rip, cs, _, _, ss = frame(machine, 6)
    assert (error_code, rip, cs, ss) == (6, machine.CODE, 0x2B, 0x23)  # user write, not present
    assert machine.vcpu.get_sregs().cr2 == UNMAPPED


def test_from_cpl3_the_stack_is_the_tss_s_and_iretq_comes_back(soft):
    machine = soft("0f0b 90" + END, "long-cpl3", rsp=0xE000)
    machine.gate(UD_VECTOR, HANDLER)
    # add qword [rsp], 2; mov rbx, rsp; iretq
    machine.write(HANDLER, bytes.fromhex("4883042402 4889e3 48cf"))
    assert machine.trace() == []
    assert machine.regs.rbx == machine.STACK - 40  # RSP0
    assert machine.regs.rsp == 0xE000
    sregs = machine.vcpu.get_sregs()
    assert (sregs.cs.selector, sregs.cs.dpl, sregs.ss.selector) == (0x2B, 3, 0x23)


def test_ist_stack(soft):
    machine = soft("0f0b", "long-cpl0")
    handled(machine, UD_VECTOR, ist=1)
    assert machine.regs.rsp == machine.STACK - 0x1000 - 40


@pytest.mark.parametrize(("kind", "masked"), [(0x8E, True), (0x8F, False)])
def test_interrupt_gate_masks_interrupts_and_trap_gate_does_not(soft, kind, masked):
    machine = soft("0f0b", "long-cpl0", rflags=2 | X86_EFLAGS_IF)
    handled(machine, UD_VECTOR, kind=kind)
    assert bool(machine.regs.rflags & X86_EFLAGS_IF) is not masked


@pytest.mark.parametrize(("code", "vector"), [("cd21", 0x21), ("cc", 3)])
def test_software_interrupt_returns_after_itself(soft, code, vector):
    machine = soft(code + END, "long-cpl0")
    machine.gate(vector, HANDLER)
    machine.write(HANDLER, bytes.fromhex("488b0424 48cf"))  # mov rax, [rsp]; iretq
    assert machine.trace() == []
    assert machine.regs.rax == machine.CODE + len(bytes.fromhex(code))


def test_software_interrupt_in_real_mode(start):
    machine = start("cd21" + END, "real")
    machine.gate(0x21, HANDLER)
    machine.write(HANDLER, bytes.fromhex("b85a5a cf"))  # mov ax, 0x5a5a; iret
    assert machine.trace() == []
    assert machine.regs.rax & 0xFFFF == 0x5A5A


def test_exception_in_real_mode(start):
    machine = start("f7f1", "real", rcx=0)
    machine.gate(DE_VECTOR, HANDLER)
    machine.write(HANDLER, bytes.fromhex(END))
    assert machine.trace() == []
    rsp = machine.regs.rsp
    ip, cs, flags = struct.unpack("<HHH", machine.bytes[rsp : rsp + 6])
    assert (ip, cs) == (machine.CODE, 0)
    assert flags & 2


def test_software_interrupt_from_cpl3_needs_a_gate_for_it(soft):
    machine = soft("cd21", "long-cpl3")
    machine.gate(0x21, 0xA000)
    handled(machine, GP_VECTOR)
    error_code, rip = frame(machine, 2)
    assert error_code == 0x21 * 8 + 2
    assert rip == machine.CODE


def test_software_interrupt_from_cpl3_through_a_gate_for_it(soft):
    machine = soft("cd21", "long-cpl3")
    handled(machine, 0x21, kind=0xEE)
    assert frame(machine, 1) == (machine.CODE + 2,)


def test_a_gate_that_is_not_present(soft):
    machine = soft("0f0b", "long-cpl0")
    machine.gate(UD_VECTOR, 0xA000, kind=0x0E)
    handled(machine, NP_VECTOR)
    assert frame(machine, 1) == (UD_VECTOR * 8 + 2,)


def test_two_contributory_exceptions_are_a_double_fault(soft):
    machine = soft("f7f1", "long-cpl0", rcx=0)  # #DE, whose gate is not present: #NP
    machine.gate(DE_VECTOR, 0xA000, kind=0x0E)
    machine.gate(DF_VECTOR, HANDLER)
    machine.gate(NP_VECTOR, 0xA000)
    machine.write(HANDLER, bytes.fromhex(END))
    assert machine.trace() == []
    assert frame(machine, 1) == (0,)
    assert machine.regs.rip >> 12 == HANDLER >> 12


def test_nothing_to_deliver_through_is_a_shutdown(start):
    machine = start("0f0b", "long-cpl0")  # an IDT of zeros
    assert machine.run() == Shutdown()


def test_an_absent_stack_is_a_fault_of_its_own_and_delivery_goes_on_after_it(soft):
    machine = soft("0f0b", "long-cpl3", flags=4)
    machine.gate(UD_VECTOR, HANDLER)
    machine.write(HANDLER, bytes.fromhex(END))
    machine.bring_in(0, machine.RAM_SIZE)
    stack = machine.STACK - 0x1000
    machine.discard(stack)
    assert machine.run() == MemoryFault(stack, 4096, 2, 14)
    assert machine.regs.rip == machine.CODE  # nothing of the vCPU has changed
    assert machine.regs.rflags & 0x3000
    assert machine.run() == MemoryFault(stack, 4096, 2, 14)
    machine.bring_in(stack)
    assert machine.trace() == []
    assert frame(machine, 1) == (machine.CODE,)


@pytest.mark.parametrize("what", ["IDT", "GDT", "TSS"])
def test_an_absent_table_is_a_fault_too(soft, what):
    machine = soft("0f0b", "long-cpl3", flags=4)
    machine.gate(UD_VECTOR, HANDLER)
    machine.write(HANDLER, bytes.fromhex(END))
    machine.bring_in(0, machine.RAM_SIZE)
    gpa = getattr(machine, what)
    machine.discard(gpa)
    assert machine.run() == MemoryFault(gpa, 4096, 2, 14)
    machine.bring_in(gpa)
    assert machine.trace() == []


def test_an_absent_frame_across_two_pages_writes_nothing(soft):
    machine = soft("0f0b", "long-cpl0", flags=4, rsp=0xE010)
    machine.gate(UD_VECTOR, HANDLER)
    machine.write(HANDLER, bytes.fromhex(END))
    machine.bring_in(0, machine.RAM_SIZE)
    machine.discard(0xE000)
    assert machine.run() == MemoryFault(0xE000, 4096, 2, 14)
    assert bytes(machine.bytes[0xD000:0xF000]) == bytes(0x2000)
    machine.bring_in(0xE000)
    assert machine.trace() == []


def test_a_stack_that_is_a_device_is_an_internal_error(soft):
    machine = soft("0f0b", "long-cpl0", rsp=0x20_0800)
    machine.gate(UD_VECTOR, HANDLER)
    assert isinstance(machine.run(), InternalError)
    assert "frame" in machine.vcpu.arch.last_error


def test_setting_registers_forgets_a_pending_exception(soft):
    machine = soft("0f0b" + END, "long-cpl3", flags=4)
    machine.gate(UD_VECTOR, HANDLER)
    machine.bring_in(0, machine.RAM_SIZE)
    machine.discard(machine.TSS)
    assert isinstance(machine.run(), MemoryFault)
    regs = machine.regs
    regs.rip = machine.CODE + 2
    machine.vcpu.set_regs(regs)
    assert machine.trace() == []


def test_the_trap_flag_of_the_guest_is_the_guest_s(soft):
    """Single-stepping itself, also over an instruction that KVM steps for it."""
    machine = soft("90 8a07 90" + END, "long-cpl0", rdi=0x20_0000, rflags=0x102)
    machine.gate(1, HANDLER)
    # pop rax; push rax; mov [rbx], rax; add rbx, 8; iretq
    machine.write(HANDLER, bytes.fromhex("58 50 488903 4883c308 48cf"))
    regs = machine.regs
    regs.rbx = DATA
    machine.vcpu.set_regs(regs)
    assert machine.trace(b"\x01") == [("read", 0x20_0000, b"\x01")]
    trapped = [machine.word(DATA + 8 * i) for i in range(3)]
    assert trapped == [machine.CODE + 1, machine.CODE + 3, machine.CODE + 4]
