"""Both stages of translation at work: pages, rights, flags, and table pages that are absent."""

import struct

import pytest

from guestfault.fault.outcome import InternalError, Io, MemoryFault, RamMmio, Shutdown
from guestfault.uapi import kvm as uapi
from guestfault.x86.entries import (
    PT64_NX_MASK,
    PT_ACCESSED_MASK,
    PT_DIRTY_MASK,
    PT_USER_MASK,
    PT_WRITABLE_MASK,
)
from guestfault.x86.registers import CR4_SMAP, CR4_SMEP, PF_VECTOR, X86_EFLAGS_AC

END = "e6f4"
DATA = 0x4_0000
HANDLER = 0x9000
READ, WRITE, JUMP = "488b07", "488907", "ffe7"
ABSENT = 2  # the seed dialect's flag for a slot that exits on a missing page


def absent(gpa):
    return MemoryFault(gpa, 4096, ABSENT, 14)


def page_fault(machine):
    """The error code of the page fault that the guest gets, and CR2."""
    machine.gate(PF_VECTOR, HANDLER)
    machine.write(HANDLER, bytes.fromhex("58" + END))  # pop rax
    assert machine.trace() == []
    return machine.regs.rax, machine.vcpu.get_sregs().cr2


@pytest.mark.parametrize("code", [READ, WRITE, "480107", "488707"])
def test_one_exit_for_each_absent_page(soft, code):
    machine = soft(code + END, flags=4, rdi=DATA)
    machine.bring_in(0, DATA)
    machine.poison_union()
    assert machine.run() == absent(DATA)
    assert machine.regs.rip == machine.CODE
    assert machine.run() == absent(DATA)  # the instruction is executed again
    machine.bring_in(DATA)
    assert machine.trace() == []


@pytest.mark.parametrize("tdp_enabled", [True], ids=["npt"])  # see test_paging_tmpl
def test_absent_code(soft):
    machine = soft(END, flags=4)
    for gpa in (0x1_0000, 0x1_1000, 0x1_2000, 0x1_3000, machine.CODE):
        assert machine.run() == absent(gpa)  # the tables in the order of the walk, then the code
        machine.bring_in(gpa)
    assert machine.trace() == []


def test_an_instruction_across_two_pages(soft):
    machine = soft("", flags=4, rip=0x8FFD)
    machine.write(0x8FFD, bytes.fromhex("48b8 88776655 44332211" + END))  # mov rax, imm64
    machine.bring_in(0, machine.RAM_SIZE)
    machine.discard(0x9000)
    assert machine.run() == absent(0x9000)
    assert machine.regs.rip == 0x8FFD
    machine.bring_in(0x9000)
    assert machine.trace() == []
    assert machine.regs.rax == 0x1122334455667788


@pytest.mark.parametrize("code", [READ, WRITE])
def test_an_access_across_two_pages(soft, code):
    machine = soft(code + END, flags=4, rdi=DATA + 0xFFC, rax=0x1122334455667788)
    machine.write(DATA + 0xFFC, struct.pack("<Q", 0x8877665544332211))
    machine.bring_in(0, DATA)
    seen = set()
    for _ in range(2):
        fault = machine.run()
        seen.add(fault.gpa)
        assert machine.regs.rip == machine.CODE
        machine.bring_in(fault.gpa)
    assert seen == {DATA, DATA + 0x1000}
    assert machine.trace() == []
    if code == READ:
        assert machine.regs.rax == 0x8877665544332211
    else:
        assert machine.word(DATA + 0xFFC) == 0x1122334455667788


def test_the_store_across_a_page_that_faults_has_stored_nothing(soft):
    machine = soft(WRITE + END, flags=4, rdi=DATA + 0xFFC, rax=2**64 - 1)
    machine.bring_in(0, DATA + 0x1000)
    assert machine.run() == absent(DATA + 0x1000)
    assert machine.word(DATA + 0xFF8) == 0


def test_accessed_and_dirty_flags_are_set_as_needed(soft):
    machine = soft(READ + "48897708" + "48899f00100000" + END, accessed=False, rdi=DATA)
    assert machine.trace() == []
    flags = PT_ACCESSED_MASK | PT_DIRTY_MASK
    assert machine.word(machine.entry_at(DATA)) & flags == flags
    assert machine.word(machine.entry_at(DATA + 0x1000)) & flags == flags
    assert machine.word(machine.entry_at(machine.CODE)) & flags == PT_ACCESSED_MASK
    assert machine.word(machine.entry_at(DATA + 0x2000)) & flags == 0
    assert machine.word(machine.TABLES) & PT_ACCESSED_MASK


def test_a_read_does_not_dirty(soft):
    machine = soft(READ + END, accessed=False, rdi=DATA)
    assert machine.trace() == []
    assert not machine.word(machine.entry_at(DATA)) & PT_DIRTY_MASK


@pytest.mark.parametrize(
    ("code", "clear", "add", "error_code"),
    [
        (READ, 1, 0, 4),
        (WRITE, 1, 0, 6),
        (JUMP, 1, 0, 0x14),
        (WRITE, PT_WRITABLE_MASK, 0, 7),
        (READ, PT_USER_MASK, 0, 5),
        (JUMP, 0, PT64_NX_MASK, 0x15),
        (READ, 0, 1 << 50, 0xD),
        ("480107", 1, 0, 6),
    ],
    ids=["read", "write", "fetch", "read-only", "supervisor", "no execute", "reserved", "both"],
)
def test_page_faults_of_cpl3(soft, code, clear, add, error_code):
    machine = soft(code, rdi=DATA + 8)
    machine.change_entry(DATA, clear=clear, add=add)
    assert page_fault(machine) == (error_code, DATA + 8)


def test_rights_are_checked_again_on_a_page_that_is_in_the_tlb(soft):
    machine = soft(READ + WRITE, rdi=DATA)
    machine.change_entry(DATA, clear=PT_WRITABLE_MASK)
    assert page_fault(machine) == (7, DATA)
    assert machine.word(DATA) == 0


@pytest.mark.parametrize(
    ("code", "cr4", "rflags", "error_code"),
    [
        (JUMP, CR4_SMEP, 2, 0x11),
        (READ, CR4_SMAP, 2, 1),
        (WRITE, CR4_SMAP, 2, 3),
    ],
)
def test_supervisor_mode_protection(soft, code, cr4, rflags, error_code):
    def protected(sregs):
        sregs.cr4 |= cr4

    machine = soft(code, "long-cpl0", rdi=DATA, rflags=rflags, sregs=protected)
    for gva in (DATA, machine.RAM_SIZE - 0x1000):
        machine.change_entry(gva, clear=0, add=PT_USER_MASK)
    for table in (0x1_0000, 0x1_1000, 0x1_2000):
        machine.write(table, struct.pack("<Q", machine.word(table) | PT_USER_MASK))
    assert page_fault(machine) == (error_code, DATA)


def test_smap_is_lifted_by_ac(soft):
    def protected(sregs):
        sregs.cr4 |= CR4_SMAP

    machine = soft(READ + END, "long-cpl0", rdi=DATA, rflags=2 | X86_EFLAGS_AC, sregs=protected)
    machine.change_entry(DATA, clear=0, add=PT_USER_MASK)
    assert machine.trace() == []


def test_non_canonical_address_is_a_general_protection_fault(soft):
    machine = soft(READ, rdi=1 << 47)
    machine.gate(13, HANDLER)
    machine.write(HANDLER, bytes.fromhex(END))
    assert machine.trace() == []
    assert machine.regs.rip >> 12 == HANDLER >> 12


def test_invlpg_makes_a_changed_entry_seen(soft):
    # read [rdi]; write the entry [rsi]; invlpg [rdi]; read again into rbx
    machine = soft("488b07 48890e 0f013f 488b1f" + END, "long-cpl0", rdi=DATA)
    machine.write(DATA, b"old page")
    machine.write(DATA + 0x1000, b"new page")
    regs = machine.regs
    regs.rsi, regs.rcx = machine.entry_at(DATA), DATA + 0x1000 | 0x63
    machine.vcpu.set_regs(regs)
    assert machine.trace() == []
    assert machine.regs.rax == int.from_bytes(b"old page", "little")
    assert machine.regs.rbx == int.from_bytes(b"new page", "little")


def test_an_entry_that_permits_more_needs_no_invlpg(soft):
    """An entry of the directory gives write permission after the table below it was walked."""
    machine = soft("488b07 488916 48891f" + END, "long-cpl0", rdi=DATA)
    directory = 0x1_2000
    value = machine.word(directory)
    machine.write(directory, struct.pack("<Q", value & ~PT_WRITABLE_MASK))
    # the directory itself must be writable for the guest: reach it at CPL0 without WP
    sregs = machine.vcpu.get_sregs()
    sregs.cr0 &= ~(1 << 16)
    machine.vcpu.set_sregs(sregs)
    regs = machine.regs
    regs.rsi, regs.rdx, regs.rbx = directory, value, 0x55
    machine.vcpu.set_regs(regs)
    assert machine.trace() == []
    assert machine.word(DATA) == 0x55


@pytest.mark.parametrize("tdp_enabled", [True], ids=["npt"])  # see test_paging_tmpl
def test_an_absent_table_page_is_a_fault_with_the_table_s_gpa(soft):
    machine = soft(READ + END, flags=4, rdi=DATA)
    machine.bring_in(0, machine.RAM_SIZE)
    table = 0x1_3000
    machine.discard(table)
    assert machine.run() == absent(table)
    machine.bring_in(table)
    assert machine.trace() == []


def test_tables_outside_of_memory_are_an_error_that_is_told(soft):
    def nowhere(sregs):
        sregs.cr3 = 0x4000_0000

    machine = soft(END, sregs=nowhere)
    assert isinstance(machine.run(), InternalError | Shutdown)


@pytest.mark.parametrize("tdp_enabled", [True], ids=["npt"])  # see test_paging_tmpl
def test_an_address_of_the_device_reached_by_the_walk_is_not_read_as_zeros(soft):
    machine = soft(READ + END, rdi=DATA)
    directory_entry = 0x1_2000 + 8 * 3
    machine.write(directory_entry, struct.pack("<Q", 0x3000_0007))
    regs = machine.regs
    regs.rdi = (3 << 21) + 8
    machine.vcpu.set_regs(regs)
    # KVM's emulator walks by copies from memory, and finds none there: a page fault of the guest's.
    assert isinstance(machine.run(), Shutdown)
    assert machine.vcpu.get_sregs().cr2 == (3 << 21) + 8


# -- tables that cannot be written -----------------------------------------------------------------

LAST_TABLE = 0x1_3000
CODE_ENTRY = 0x40  # where in it the entry of the code is, which each fetch walks by


@pytest.fixture
def in_rom(soft):
    """Start a machine, and have its last page table in a read-only slot."""

    def start(code, mode="long-cpl3", **regs):
        machine = soft(code, mode, **regs)
        address, rest = machine.ram.guest.address, LAST_TABLE + 0x1000
        machine.vm.set_user_memory_region(0, 0, 0, 0)
        machine.vm.set_user_memory_region(0, 0, LAST_TABLE, address)
        rom = address + LAST_TABLE
        machine.vm.set_user_memory_region(1, LAST_TABLE, 0x1000, rom, uapi.KVM_MEM_READONLY)
        machine.vm.set_user_memory_region(2, rest, machine.RAM_SIZE - rest, address + rest)
        return machine

    return start


def test_a_guest_whose_tables_are_in_rom_is_emulated(in_rom, tdp_enabled):
    """To NPT a walk writes: the processor does not even come to its code."""
    machine = in_rom("488b07 48894708 e680 e480" + END, rdi=DATA + 8)
    machine.write(DATA + 8, b"contents")
    assert machine.trace(0x5A) == [("out", 0x80, b"c"), ("in", 0x80, b"\x5a")]
    assert machine.word(DATA + 16) == int.from_bytes(b"contents", "little")
    assert machine.regs.rax == int.from_bytes(b"\x5aontents", "little")
    if tdp_enabled:
        assert LAST_TABLE >> 12 not in machine.vm.kvm.second_stage.sptes
        assert machine.vcpu.arch.stat.pf_emulate == 5  # each instruction


@pytest.mark.parametrize("code", [READ, WRITE])
def test_an_operand_at_the_offset_of_the_entry(in_rom, tdp_enabled, code):
    """It passes for the entry, as in Linux 7.3: the case read-only-slot/walk-read-alias."""
    machine = in_rom(code + END, rdi=DATA + CODE_ENTRY, rax=0x1234)
    machine.write(DATA + CODE_ENTRY, b"contents")
    entry = machine.word(LAST_TABLE + CODE_ENTRY)
    end = machine.run()
    if not tdp_enabled:
        assert isinstance(end, Io)
    elif code == READ:
        assert isinstance(end, Io)
        assert machine.regs.rax == entry
    else:
        gpa = LAST_TABLE + CODE_ENTRY
        assert end == RamMmio(gpa, (0x1234).to_bytes(8, "little"), 8, True)
        assert machine.word(DATA + CODE_ENTRY) == int.from_bytes(b"contents", "little")


@pytest.mark.parametrize("tdp_enabled", [True], ids=["npt"])
@pytest.mark.parametrize("code", ["ff7708", "a4"])  # push [rdi + 8]; movsb
def test_two_operands_do_not_pass_for_it(in_rom, code):
    machine = in_rom(code + END, rdi=DATA + CODE_ENTRY - 8, rsi=DATA + CODE_ENTRY)
    machine.write(DATA + CODE_ENTRY, b"contents")
    assert machine.trace() == []
    seen = machine.word(machine.STACK - 8) if code == "ff7708" else machine.word(DATA + 0x38, 1)
    assert seen.to_bytes(8, "little").rstrip(b"\0") == b"contents"[: 1 if code == "a4" else 8]


@pytest.mark.parametrize("tdp_enabled", [True], ids=["npt"])
def test_what_is_said_of_an_instruction_that_is_not_emulated(in_rom):
    machine = in_rom("0f05" + END, "long-cpl0")  # syscall
    end = machine.run()
    assert isinstance(end, InternalError)
    assert end.instruction.startswith(b"\x0f\x05\xe6\xf4")
    walks, gpa = 1 << 33 | 4 | 2, LAST_TABLE + CODE_ENTRY
    assert end.data[3:] == (0x400, walks, gpa, 0, 0)


@pytest.mark.parametrize("last", ["488b07", "ffe6"])
def test_code_that_the_guest_has_not_come_to_is_no_fault(soft, last):
    """The engine translates into the next page before it executes the end of this one."""
    end = 0x9000
    at = end - 5 - len(last) // 2
    code = "e9" + struct.pack("<i", at - 0x8000 - 5).hex()
    machine = soft(code, flags=4, rdi=DATA, rsi=0xA000)
    machine.write(at, bytes.fromhex("9090909090" + last))
    machine.write(end, bytes.fromhex(END))
    machine.write(0xA000, bytes.fromhex(END))
    machine.bring_in(0, end)
    machine.bring_in(0xA000, DATA - 0xA000)
    if last == "ffe6":  # jmp rsi: it never comes there
        assert isinstance(machine.run(), Io)
        return
    assert machine.run() == absent(DATA)
    assert machine.regs.rip == at + 5
    machine.bring_in(DATA, 4096)
    assert machine.run() == absent(end)
    assert machine.regs.rip == end
    machine.bring_in(end, 4096)
    assert isinstance(machine.run(), Io)


def test_an_instruction_that_goes_on_in_an_absent_page_is_a_fault_of_that_page(soft):
    end = 0x9000
    code = "e9" + struct.pack("<i", end - 2 - 0x8000 - 5).hex()
    machine = soft(code, flags=4, rdi=DATA)
    machine.write(end - 2, bytes.fromhex("488b07" + END))  # its last byte is over there
    machine.bring_in(0, end)
    machine.bring_in(0xA000, DATA)
    assert machine.run() == absent(end)
    assert machine.regs.rip == end - 2
    machine.bring_in(end, 4096)
    assert isinstance(machine.run(), Io)
