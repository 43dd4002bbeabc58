"""The guests' code, run on Unicorn's processor and compared with the host's prediction."""

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from iced_x86 import Decoder, Mnemonic
from unicorn import (
    UC_ARCH_X86,
    UC_HOOK_INSN,
    UC_HOOK_MEM_READ,
    UC_HOOK_MEM_WRITE,
    UC_MEM_WRITE,
    UC_MODE_16,
    UC_MODE_64,
    Uc,
)
from unicorn import x86_const as x86

from guestfault.guest.boot import entry_state, initial_memory
from guestfault.guest.expect import expect
from guestfault.guest.layout import PAGE_SIZE, Layout, Mode
from guestfault.guest.program import DONE_PORT, READY_PORT, RESULT_PORT, assemble
from guestfault.guest.walk import Walk

MEMORY = 25 * PAGE_SIZE
EVERY_GUEST = list(itertools.product(Mode, Walk))
# Simple for an emulator to execute, and enough for the guests.
SIMPLE = {
    *(Mnemonic.ADD, Mnemonic.AND, Mnemonic.CMP, Mnemonic.DEC, Mnemonic.IMUL, Mnemonic.LEA),
    *(Mnemonic.MOV, Mnemonic.OR, Mnemonic.OUT, Mnemonic.SHL, Mnemonic.SHR, Mnemonic.SUB),
    *(Mnemonic.XOR, Mnemonic.JAE, Mnemonic.JMP, Mnemonic.JNE),
}


class Machine:
    """A guest's memory, on which its vCPUs run one after the other.

    Long mode goes through the guest's own page tables.  CPL 3 runs at CPL 0 here, which the same
    code cannot tell.
    """

    def __init__(self, layout, memory, trace=False):
        self.layout = layout
        self.memory = bytearray(memory)
        self.trace = trace
        self.stored_first = {}  # page number -> whether its first access was a store

    def run(self, vcpu):
        """Run to the end; the checksum."""
        self.outs = []
        uc = self.processor(entry_state(self.layout, vcpu))
        uc.emu_start(uc.reg_read(x86.UC_X86_REG_RIP), self.layout.gva(self.layout.memory_size))
        self.memory[:] = uc.mem_read(0, self.layout.memory_size)
        ready, low, high, done = self.outs
        assert (ready[:2], done[:2]) == ((READY_PORT, 1), (DONE_PORT, 1))
        assert low[:2] == high[:2] == (RESULT_PORT, 4)
        return low[2] | high[2] << 32

    def processor(self, state):
        is_long = self.layout.mode.is_long
        uc = Uc(UC_ARCH_X86, UC_MODE_64 if is_long else UC_MODE_16)
        uc.mem_map(0, self.layout.memory_size)
        uc.mem_write(0, bytes(self.memory))
        for name in ("CR3", "CR4", "CR0") if is_long else ():
            uc.reg_write(getattr(x86, f"UC_X86_REG_{name}"), getattr(state.sregs, name.lower()))
        for name in ("IP", "BX", "BP", "SI"):
            register = getattr(x86, f"UC_X86_REG_{'R' if is_long else 'E'}{name}")
            uc.reg_write(register, getattr(state.regs, f"r{name.lower()}"))
        uc.hook_add(UC_HOOK_INSN, self.on_out, aux1=x86.UC_X86_INS_OUT)
        if self.trace:
            uc.hook_add(UC_HOOK_MEM_READ | UC_HOOK_MEM_WRITE, self.on_access)
        return uc

    def on_out(self, uc, port, size, value, _):
        self.outs.append((port, size, value))
        if port == DONE_PORT:
            uc.emu_stop()

    def on_access(self, uc, kind, gpa, size, value, _):
        self.stored_first.setdefault(gpa // PAGE_SIZE, kind == UC_MEM_WRITE)


@pytest.mark.parametrize("vcpus", [1, 2, 3])
@pytest.mark.parametrize(("mode", "walk"), EVERY_GUEST)
def test_computes_what_the_host_expects(mode, walk, vcpus):
    layout = Layout(MEMORY, mode, vcpus)
    memory = initial_memory(layout, walk, seed=5)
    machine = Machine(layout, memory)
    # The last vCPU first: their order must not matter.
    checksums = [machine.run(vcpu) for vcpu in reversed(range(vcpus))]
    expected = expect(layout, walk, memory)
    assert tuple(reversed(checksums)) == expected.checksums
    assert machine.memory == expected.memory


@pytest.mark.parametrize(("mode", "walk"), EVERY_GUEST)
def test_one_vcpu_touches_every_page(mode, walk):
    layout = Layout(16 * PAGE_SIZE, mode)
    machine = Machine(layout, initial_memory(layout, walk, seed=6), trace=True)
    machine.run(0)
    data = dict.fromkeys(layout.data, walk is Walk.WRITE_HEAVY)
    assert machine.stored_first == dict.fromkeys(range(layout.header_pages), False) | data


@given(st.sampled_from(EVERY_GUEST), st.integers(16, 70), st.integers(1, 11), st.integers(0, 99))
def test_computes_what_the_host_expects_at_any_size(guest, pages, vcpus, seed):
    mode, walk = guest
    layout = Layout(pages * PAGE_SIZE, mode, vcpus)
    memory = initial_memory(layout, walk, seed)
    vcpu = random.Random(seed).randrange(vcpus)
    assert Machine(layout, memory).run(vcpu) == expect(layout, walk, memory).checksums[vcpu]


@given(st.sampled_from(EVERY_GUEST), st.data())
def test_a_wrong_byte_of_data_changes_the_checksum(guest, data):
    mode, walk = guest
    layout = Layout(16 * PAGE_SIZE, mode)
    memory = initial_memory(layout, walk, seed=7)
    right = Machine(layout, memory).run(0)
    at = data.draw(st.integers(layout.header_pages * PAGE_SIZE, layout.memory_size - 1))
    memory[at] ^= data.draw(st.integers(1, 255))
    lost = walk is Walk.WRITE_HEAVY and at % PAGE_SIZE < mode.word_size
    assert (Machine(layout, memory).run(0) == right) == lost


@pytest.mark.parametrize(("mode", "walk"), EVERY_GUEST)
@pytest.mark.parametrize("memory_size", [MEMORY, 3 << 30])
def test_code_fits_its_page_and_is_simple(mode, walk, memory_size):
    code = assemble(Layout(memory_size, mode), walk)
    instructions = list(Decoder(64 if mode.is_long else 16, code))
    assert len(code) < 1024
    assert sum(len(instruction) for instruction in instructions) == len(code)
    assert instructions[0].mnemonic == Mnemonic.OUT
    assert {i.mnemonic for i in instructions} <= SIMPLE
    assert not any(i.is_stack_instruction or i.has_rep_prefix for i in instructions)
