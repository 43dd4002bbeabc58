"""The exact address of a page fault, and the accesses that the processor makes for itself."""

import struct

import pytest

from guestfault.x86.entries import PT_USER_MASK
from guestfault.x86.registers import PF_VECTOR
from guestfault.x86.segments import FLAT_GDT

END = "e6f4"
DATA = 0x4_0000
HANDLER = 0x9000


def page_fault(machine):
    machine.gate(PF_VECTOR, HANDLER)
    machine.write(HANDLER, bytes.fromhex("58" + END))
    assert machine.trace() == []
    return machine.regs.rax, machine.vcpu.get_sregs().cr2


@pytest.mark.parametrize(
    ("code", "address"),
    [
        ("488b4713", DATA + 0x13),  # mov rax, [rdi+0x13]
        ("488b87fd0f0000", DATA + 0x1000),  # across the end of the page before, which is there
        ("f3a4", DATA + 7),  # rep movsb
        ("48ff7710", DATA + 0x10),  # push [rdi+0x10]
    ],
)
def test_cr2_is_exact_to_the_byte(soft, code, address):
    machine = soft(code, rdi=DATA, rsi=DATA + 7, rcx=9)
    machine.change_entry(address)
    assert page_fault(machine)[1] == address


def test_cr2_of_a_stack_access(soft):
    machine = soft("50", rsp=DATA + 0x10)
    machine.change_entry(DATA)
    assert page_fault(machine) == (6, DATA + 8)


def test_cr2_of_a_fetch_that_crosses_into_the_page(soft):
    machine = soft("", rip=0xBFFE)
    machine.write(0xBFFE, bytes.fromhex("48b8"))
    machine.change_entry(0xC000)
    assert page_fault(machine)[1] == 0xC000


def test_rep_stops_with_the_registers_of_the_element_that_faulted(soft):
    machine = soft("f3aa", rdi=DATA + 0xFF0, rcx=0x20, rax=1)
    machine.change_entry(DATA + 0x1000)
    assert page_fault(machine) == (6, DATA + 0x1000)
    assert machine.regs.rcx == 0x10
    assert machine.bytes[DATA + 0xFF0 : DATA + 0x1000] == bytes([1]) * 16


def test_a_segment_load_at_cpl3_reads_a_descriptor_that_only_the_kernel_may_read(soft):
    machine = soft("b823000000 8ed8" + END)
    machine.change_entry(machine.GDT, clear=PT_USER_MASK)
    assert machine.trace() == []
    assert machine.vcpu.get_sregs().ds.selector == 0x23


def test_that_access_leaves_the_page_closed_to_the_user(soft):
    machine = soft("b823000000 8ed8 488b07", rdi=0x5008)
    machine.change_entry(machine.GDT, clear=PT_USER_MASK)
    assert page_fault(machine) == (5, machine.GDT + 8)


def test_a_descriptor_that_nobody_may_read_is_a_supervisor_s_page_fault(soft):
    machine = soft("b823000000 8ed8")

    def far_table(sregs):
        sregs.gdt.base = DATA

    # The handler's own code segment must be had: only the data descriptor is beyond the page.
    table = DATA + 0x1000 - 0x20
    machine.write(table, FLAT_GDT)
    sregs = machine.vcpu.get_sregs()
    sregs.gdt.base = table
    machine.vcpu.set_sregs(sregs)
    machine.change_entry(DATA + 0x1000)
    assert page_fault(machine) == (0, DATA + 0x1000)


def test_code_that_reads_its_own_page(soft):
    """Fetch and read are of one page: the read is what faults, for it is checked apart."""
    machine = soft("488b05f8ffffff" + END)
    value = struct.pack("<Q", 0x1122334455667788)
    machine.write(machine.CODE + 0x100, value)
    assert machine.trace() == []
