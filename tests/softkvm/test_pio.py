"""Port I/O, on both KVMs where this host's real one can."""

import pytest

from guestfault.fault.outcome import Io, RamMmio, Shutdown
from guestfault.uapi.mman import PROT_NONE
from guestfault.x86.registers import X86_EFLAGS_DF

DATA = 0x4_0000
DEVICE = 0x20_0000
END = "e6f4"
MODES = ("real", "long-cpl0", "long-cpl3")

# name: (code, registers, answers, what userspace sees, registers afterwards)
PORTS = {
    "out imm8, al": ("e642", {"rax": 0x11223344}, [], [("out", 0x42, b"\x44")], {}),
    "out dx, al": ("ee", {"rax": 0x44, "rdx": 0x91}, [], [("out", 0x91, b"\x44")], {}),
    "in al, imm8": (
        "e442",
        {"rax": 0x11223344},
        [b"\x99"],
        [("in", 0x42, b"\x99")],
        {"rax": 0x11223399},
    ),
    "in al, dx": ("ec", {"rdx": 0x91}, [b"\x99"], [("in", 0x91, b"\x99")], {"rax": 0x99}),
}
# The same bytes mean 2 bytes in one mode and 4 in another.
WIDE = {
    "out imm8, eax": ("e742", {"rax": 0x44332211}, [], [("out", 0x42, b"\x11\x22\x33\x44")], {}),
    "out dx, ax": ("66ef", {"rax": 0x2211, "rdx": 0x90}, [], [("out", 0x90, b"\x11\x22")], {}),
    "in eax, dx": (
        "ed",
        {"rax": 2**64 - 1, "rdx": 0x90},
        [b"\x01\x02\x03\x04"],
        [("in", 0x90, b"\x01\x02\x03\x04")],
        {"rax": 0x04030201},
    ),
    "in ax, dx": (
        "66ed",
        {"rax": 2**64 - 1, "rdx": 0x90},
        [b"\x01\x02"],
        [("in", 0x90, b"\x01\x02")],
        {"rax": 2**64 - 1 & ~0xFFFF | 0x0201},
    ),
}


def check(machine, case):
    _, _, answers, seen, after = case
    assert machine.trace(*answers) == seen
    for register, value in after.items():
        assert getattr(machine.regs, register) == value, register


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", PORTS)
def test_port(start, name, mode):
    code, regs, *_ = PORTS[name]
    check(start(code + END, mode, **regs), PORTS[name])


@pytest.mark.parametrize("mode", ["long-cpl0", "long-cpl3"])
@pytest.mark.parametrize("name", WIDE)
def test_wide_port(start, name, mode):
    code, regs, *_ = WIDE[name]
    check(start(code + END, mode, **regs), WIDE[name])


@pytest.mark.parametrize("mode", ["long-cpl0", "long-cpl3"])
@pytest.mark.parametrize(("backwards", "order"), [(False, "abcd"), (True, "dcba")])
def test_rep_outs(start, mode, backwards, order):
    rsi = DATA + (3 if backwards else 0)
    prefix = "fd" if backwards else "fc"
    machine = start(prefix + "f36e" + END, mode, rsi=rsi, rcx=4, rdx=0x90)
    machine.write(DATA, b"abcd")
    assert machine.trace() == [("out", 0x90, letter.encode()) for letter in order]
    assert machine.regs.rcx == 0
    assert machine.regs.rsi == rsi + (-4 if backwards else 4)


@pytest.mark.parametrize("mode", ["long-cpl0", "long-cpl3"])
@pytest.mark.parametrize("backwards", [False, True])
def test_rep_ins(start, mode, backwards):
    rdi = DATA + (6 if backwards else 0)
    prefix = "fd" if backwards else "fc"
    machine = start(prefix + "66f36d" + END, mode, rdi=rdi, rcx=4, rdx=0x90)
    words = [b"ab", b"cd", b"ef", b"gh"]
    trace = machine.trace(*words)
    assert trace == [("in", 0x90, word) for word in words]
    expected = b"ghefcdab" if backwards else b"abcdefgh"
    assert machine.bytes[DATA : DATA + 8] == expected
    assert machine.regs.rcx == 0
    assert machine.regs.rdi == rdi + (-8 if backwards else 8)
    assert bool(machine.regs.rflags & X86_EFLAGS_DF) is backwards


@pytest.mark.parametrize("mode", MODES)
def test_one_string_element(start, mode):
    machine = start("6c6e" + END, mode, rdi=0x9000, rsi=0x9000, rdx=0x90)
    assert machine.trace(b"x") == [("in", 0x90, b"x"), ("out", 0x90, b"x")]


def test_rep_with_a_count_of_zero_does_nothing(start):
    machine = start("f36e f36c" + END, "long-cpl3", rsi=DATA, rdi=DATA, rcx=0, rdx=0x90)
    assert machine.trace() == []


def test_string_io_with_a_32_bit_address(soft):
    top = 0xABCD << 32
    machine = soft("67f36e" + END, rsi=top | DATA, rcx=top | 2, rdx=0x90)
    machine.write(DATA, b"ab")
    assert machine.trace() == [("out", 0x90, b"a"), ("out", 0x90, b"b")]
    assert machine.regs.rcx == top
    assert machine.regs.rsi == top | DATA + 2


@pytest.mark.parametrize("mode", ["long-cpl0", "long-cpl3"])
def test_outs_from_an_absent_page_asks_userspace_what_is_in_ram(start, mode):
    """The emulator reads it, on every processor: what fails is taken for a device."""
    machine = start("6e" + END, mode, rsi=DATA, rdx=0x90)
    machine.write(DATA, b"x")
    machine.ram.guest.protect(DATA, 4096, PROT_NONE)
    assert machine.run() == RamMmio(DATA, b"", 1, False)
    assert machine.regs.rip == machine.CODE
    machine.vcpu.kvm_run.mmio.data[0] = machine.bytes[DATA]
    assert machine.trace() == [("out", 0x90, b"x")]


@pytest.mark.parametrize("mode", ["long-cpl0", "long-cpl3"])
def test_ins_to_an_absent_page_is_lost_unless_userspace_stores_it(start, mode):
    machine = start("6c" + END, mode, rdi=DATA, rdx=0x90)
    machine.ram.guest.protect(DATA, 4096, PROT_NONE)
    assert isinstance(machine.run(), Io)
    assert machine.regs.rip == machine.CODE
    machine.vcpu.run_area[4096] = ord("x")
    assert machine.run() == RamMmio(DATA, b"x", 1, True)
    assert machine.regs.rip == machine.CODE + 1  # it will not be made again
    assert machine.regs.rdi == DATA + 1
    assert machine.bytes[DATA] == 0
    assert machine.trace() == []


def test_a_page_that_is_missing_only_from_the_host_s_tables_is_no_failure(soft):
    """The slot's flag makes the guest's own faults exit; KVM's copies bring the page in."""
    machine = soft("6e 6c" + END, flags=4, rsi=DATA, rdi=DATA, rdx=0x90)
    machine.write(DATA, b"x")
    machine.bring_in(0, DATA)
    assert machine.trace(b"y") == [("out", 0x90, b"x"), ("in", 0x90, b"y")]
    assert machine.bytes[DATA] == ord("y")


def test_rep_ins_reads_ahead_what_the_page_has_room_for(start):
    machine = start("f36c" + END, "long-cpl3", rdi=DATA + 0xFFE, rcx=5, rdx=0x90)
    assert machine.run() == Io(0x90, 1, 2, True, 4096)
    assert machine.regs.rcx == 5
    machine.vcpu.run_area[4096:4098] = b"ab"
    assert machine.run() == Io(0x90, 1, 3, True, 4096)
    assert (machine.regs.rcx, machine.regs.rdi) == (3, DATA + 0x1000)
    machine.vcpu.run_area[4096:4099] = b"cde"
    assert machine.trace() == []
    assert machine.bytes[DATA + 0xFFE : DATA + 0x1003] == b"abcde"


def test_rep_ins_to_an_absent_page_comes_eight_bytes_at_a_time(start):
    machine = start("f36c" + END, "long-cpl3", rdi=DATA, rcx=20, rdx=0x90)
    machine.ram.guest.protect(DATA, 4096, PROT_NONE)
    assert machine.run() == Io(0x90, 1, 20, True, 4096)
    machine.vcpu.run_area[4096:4116] = bytes(range(20))
    assert [machine.run() for _ in range(3)] == [
        RamMmio(DATA, bytes(range(8)), 8, True),
        RamMmio(DATA + 8, bytes(range(8, 16)), 8, True),
        RamMmio(DATA + 16, bytes(range(16, 20)), 4, True),
    ]
    assert machine.trace() == []


def test_rep_ins_backwards_to_an_absent_page_loses_what_was_read_ahead(start):
    """One element an exit, after which the emulator begins anew: the device is asked again."""
    machine = start("fd f36c" + END, "long-cpl3", rdi=DATA + 9, rcx=3, rdx=0x90)
    machine.ram.guest.protect(DATA, 4096, PROT_NONE)
    assert machine.run() == Io(0x90, 1, 3, True, 4096)
    machine.vcpu.run_area[4096:4099] = b"abc"
    assert machine.run() == RamMmio(DATA + 9, b"a", 1, True)
    assert machine.run() == Io(0x90, 1, 2, True, 4096)


def test_outs_is_done_when_userspace_sees_it(start):
    """The kernel retires it before the exit, where it retires OUT after."""
    machine = start("6e" + END, "long-cpl3", rsi=DATA, rdx=0x90)
    assert isinstance(machine.run(), Io)
    assert (machine.regs.rip, machine.regs.rsi) == (machine.CODE + 1, DATA + 1)


def test_rep_outs_stays_until_its_count_is_zero(start):
    machine = start("f36e" + END, "long-cpl3", rsi=DATA, rcx=2, rdx=0x90)
    for left in (1, 0):
        assert isinstance(machine.run(), Io)
        assert (machine.regs.rip, machine.regs.rcx) == (machine.CODE, left)
    assert machine.trace() == []


def test_ins_to_a_device(start):
    machine = start("6c" + END, "long-cpl3", rdi=DEVICE, rdx=0x90)
    assert machine.trace(b"x") == [("in", 0x90, b"x"), ("write", DEVICE, b"x")]


def test_outs_from_a_device(start):
    machine = start("6e" + END, "long-cpl3", rsi=DEVICE, rdx=0x90)
    assert machine.trace(b"x") == [("read", DEVICE, b"x"), ("out", 0x90, b"x")]


def test_outs_from_a_page_of_the_guest_s_that_is_not_present(soft):
    machine = soft("6e", rsi=DATA, rdx=0x90)
    machine.change_entry(DATA)
    machine.gate(14, 0x9000)
    machine.write(0x9000, bytes.fromhex(END))
    assert machine.trace() == []
    assert machine.vcpu.get_sregs().cr2 == DATA


def test_rip_that_userspace_moves_during_port_io_stays(start):
    machine = start("ee90" + END, "long-cpl3", rdx=0x90)
    assert isinstance(machine.run(), Io)
    regs = machine.regs
    regs.rip = machine.CODE + 2
    machine.vcpu.set_regs(regs)
    assert machine.trace() == []


def test_iopl_and_tss_permit_ports(soft):
    machine = soft("ee" + END, rdx=0x90, rflags=2)  # IOPL 0: the TSS's bitmap decides
    assert machine.trace() == [("out", 0x90, b"\0")]


@pytest.mark.parametrize("code", ["ee", "ef", "ec", "6e", "6c"])
def test_a_port_that_neither_permits_is_a_general_protection_fault(soft, code):
    handler = 0x9000
    machine = soft(code, rdx=0x100, rdi=DATA, rsi=DATA, rflags=2)
    machine.gate(13, handler)
    machine.write(handler, bytes.fromhex(END))
    assert machine.trace() == []
    assert machine.regs.rip >> 12 == handler >> 12
    assert machine.word(machine.regs.rsp) == 0  # error code
    assert machine.word(machine.regs.rsp + 8) == machine.CODE


def test_a_wide_access_needs_all_its_ports(soft):
    machine = soft("ef", rdx=0xFE, rflags=2)
    assert isinstance(machine.run(), Shutdown)


def test_the_first_instruction_of_all_may_be_port_io(soft):
    machine = soft("e442", "real")
    assert machine.run() == Io(0x42, 1, 1, True, 4096)


def test_code_that_was_port_io_and_is_something_else_now(soft):
    """Where a stop was planted on the first code."""
    machine = soft("e642 e642 e642" + END)
    assert machine.trace() == [("out", 0x42, b"\0")] * 3
    machine.discard(machine.CODE)
    machine.write(machine.CODE, bytes.fromhex("b007 9090 9090" + END))
    machine.bring_in(machine.CODE)
    regs = machine.regs
    regs.rip = machine.CODE
    machine.vcpu.set_regs(regs)
    assert machine.trace() == []
    assert machine.regs.rax == 7


def test_code_that_the_guest_writes_itself(soft):
    """It turns NOPs into ``OUT 0x42, al`` after having run them."""
    target = 0x9000
    machine = soft(
        "ffd3"  # call rbx
        "66c703e642"  # mov word [rbx], 0x42e6: out 0x42, al
        "ffd3" + END,
        rbx=target,
        rax=5,
    )
    machine.write(target, bytes.fromhex("9090c3"))
    assert machine.trace() == [("out", 0x42, b"\x05")]


def test_many_port_instructions_in_one_block(soft):
    count = 200
    machine = soft("e642" * count + END)
    assert machine.trace() == [("out", 0x42, b"\0")] * count
