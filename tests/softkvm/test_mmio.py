"""Instructions that access a device: what userspace is asked, and where RIP is meanwhile."""

import struct

import pytest

from guestfault.fault.outcome import InternalError, MemoryFault, Mmio, Shutdown

MODES = ("long-cpl0", "long-cpl3")
DEVICE = 0x20_0000
DATA = 0x4_0000
END = "e6f4"
V8 = bytes(range(1, 9))

# name: (code, registers, answers, what userspace sees, registers afterwards)
ACCESSES = {
    "read 1": ("8a07", {}, [b"\x5a"], [("read", 0, b"\x5a")], {"rax": 0x5A}),
    "read 2": ("668b07", {}, [b"\x34\x12"], [("read", 0, b"\x34\x12")], {"rax": 0x1234}),
    "read 4": ("8b07", {"rax": -1}, [V8[:4]], [("read", 0, V8[:4])], {"rax": 0x04030201}),
    "read 8": ("488b07", {}, [V8], [("read", 0, V8)], {"rax": 0x0807060504030201}),
    "read unaligned": (
        "488b4703",
        {},
        [V8],
        [("read", 3, V8)],
        {"rax": 0x0807060504030201},
    ),
    "read sign extended": ("480fbe07", {}, [b"\x80"], [("read", 0, b"\x80")], {"rax": -128}),
    "write 1": ("8807", {"rax": 0x11}, [], [("write", 0, b"\x11")], {}),
    "write 2": ("668907", {"rax": 0x2211}, [], [("write", 0, b"\x11\x22")], {}),
    "write 4": ("8907", {"rax": 0x44332211}, [], [("write", 0, b"\x11\x22\x33\x44")], {}),
    "write 8": ("488907", {"rax": 0x0807060504030201}, [], [("write", 0, V8)], {}),
    "write unaligned": (
        "48894705",
        {"rax": 0x0807060504030201},
        [],
        [("write", 5, V8)],
        {},
    ),
    "add to device": (
        "0107",
        {"rax": 5},
        [b"\x01\0\0\0"],
        [("read", 0, b"\x01\0\0\0"), ("write", 0, b"\x06\0\0\0")],
        {},
    ),
    "add from device": ("480307", {"rax": 1}, [V8], [("read", 0, V8)], {"rax": 0x0807060504030202}),
    "exchange": (
        "8707",
        {"rax": 7},
        [b"\x09\0\0\0"],
        [("read", 0, b"\x09\0\0\0"), ("write", 0, b"\x07\0\0\0")],
        {"rax": 9},
    ),
    "locked add": (
        "f00107",
        {"rax": 5},
        [b"\x01\0\0\0"],
        [("read", 0, b"\x01\0\0\0"), ("write", 0, b"\x06\0\0\0")],
        {},
    ),
    "push device": ("ff37", {}, [V8], [("read", 0, V8)], {}),
    "two reads": (
        "8b078b4f04",
        {},
        [b"\x01\0\0\0", b"\x02\0\0\0"],
        [("read", 0, b"\x01\0\0\0"), ("read", 4, b"\x02\0\0\0")],
        {"rax": 1, "rcx": 2},
    ),
    "rep stosb": (
        "f3aa",
        {"rax": 0x77, "rcx": 3},
        [],
        [("write", 0, b"\x77"), ("write", 1, b"\x77"), ("write", 2, b"\x77")],
        {"rcx": 0, "rdi": DEVICE + 3},
    ),
}


def expect(seen, where=DEVICE):
    return [(what, where + offset, data) for what, offset, data in seen]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ACCESSES)
def test_what_userspace_sees(start, name, mode):
    code, regs, answers, seen, after = ACCESSES[name]
    regs = {k: v & (1 << 64) - 1 for k, v in regs.items()}
    machine = start(code + END, mode, rdi=DEVICE, **regs)
    assert machine.trace(*answers) == expect(seen)
    for register, value in after.items():
        assert getattr(machine.regs, register) == value & (1 << 64) - 1, register


def test_push_stores_what_the_device_gave(start):
    machine = start("ff37" + END, "long-cpl3", rdi=DEVICE)
    machine.trace(V8)
    assert machine.bytes[machine.STACK - 8 : machine.STACK] == V8


def test_sixteen_bytes_come_and_go_as_two_fragments(start):
    machine = start("0f1007 0f114710" + END, "long-cpl3", rdi=DEVICE)  # movups xmm0; store
    low, high = V8, bytes(range(9, 17))
    assert machine.trace(low, high) == expect(
        [("read", 0, low), ("read", 8, high), ("write", 16, low), ("write", 24, high)]
    )


def test_movs_from_device_to_ram(start):
    machine = start("f3a5" + END, "long-cpl3", rsi=DEVICE, rdi=DATA, rcx=3)
    assert machine.trace(b"aaaa", b"bbbb", b"cccc") == expect(
        [("read", 0, b"aaaa"), ("read", 4, b"bbbb"), ("read", 8, b"cccc")]
    )
    assert machine.bytes[DATA : DATA + 12] == b"aaaabbbbcccc"
    assert machine.regs.rcx == 0


def test_movs_from_ram_to_device(start):
    machine = start("f3a5" + END, "long-cpl3", rsi=DATA, rdi=DEVICE, rcx=3)
    machine.write(DATA, b"aaaabbbbcccc")
    assert machine.trace() == expect(
        [("write", 0, b"aaaa"), ("write", 4, b"bbbb"), ("write", 8, b"cccc")]
    )


def test_movs_from_device_to_device(start):
    machine = start("a5" + END, "long-cpl3", rsi=DEVICE, rdi=DEVICE + 0x1000)
    assert machine.trace(b"abcd") == [
        ("read", DEVICE, b"abcd"),
        ("write", DEVICE + 0x1000, b"abcd"),
    ]


def test_rip_is_on_a_read_and_past_a_write(soft):
    machine = soft("8b07 8907" + END, rdi=DEVICE)
    assert isinstance(machine.run(), Mmio)
    assert machine.regs.rip == machine.CODE
    assert machine.run() == Mmio(DEVICE, bytes(4), 4, True)
    assert machine.regs.rip == machine.CODE + 4


def test_the_flags_of_a_read_modify_write_are_the_operation_s(start):
    machine = start("0107 9c 58" + END, "long-cpl3", rdi=DEVICE, rax=1)
    machine.trace(b"\xff\xff\xff\xff")
    assert machine.regs.rax & 0x41 == 0x41  # carry and zero
    assert not machine.regs.rax & 0x100  # and no trace of the single step


def test_a_read_that_is_abandoned_by_moving_rip_is_forgotten(start):
    machine = start("8b07" + END, "long-cpl3", rdi=DEVICE)
    assert isinstance(machine.run(), Mmio)
    machine.vcpu.kvm_run.mmio.data[:4] = b"\x01\x02\x03\x04"
    regs = machine.regs
    regs.rip, regs.rax = machine.CODE + 2, 0
    machine.vcpu.set_regs(regs)
    assert machine.trace() == []


def test_an_answer_is_used_for_one_execution_only(soft):
    """Read from the device, store to an absent page: the device is asked once an execution."""
    machine = soft("a5" + END, flags=4, rsi=DEVICE, rdi=DATA)
    machine.bring_in(0, DATA)
    assert machine.run() == Mmio(DEVICE, b"", 4, False)
    machine.vcpu.kvm_run.mmio.data[:4] = b"1111"
    assert machine.run() == MemoryFault(DATA, 4096, 2, 14)
    machine.bring_in(DATA)
    assert machine.trace() == []  # not asked again
    assert machine.bytes[DATA : DATA + 4] == b"1111"
    regs = machine.regs
    regs.rip, regs.rsi, regs.rdi = machine.CODE, DEVICE, DATA
    machine.vcpu.set_regs(regs)
    assert machine.trace(b"2222") == [("read", DEVICE, b"2222")]
    assert machine.bytes[DATA : DATA + 4] == b"2222"


def test_registers_set_after_a_fault_drop_the_answer(soft):
    machine = soft("a5" + END, flags=4, rsi=DEVICE, rdi=DATA)
    machine.bring_in(0, DATA)
    assert isinstance(machine.run(), Mmio)
    machine.vcpu.kvm_run.mmio.data[:4] = b"1111"
    assert isinstance(machine.run(), MemoryFault)
    machine.vcpu.set_regs(machine.regs)
    machine.bring_in(DATA)
    assert machine.trace(b"2222") == [("read", DEVICE, b"2222")]
    assert machine.bytes[DATA : DATA + 4] == b"2222"


def test_read_only_slot_is_memory_to_reads_and_a_device_to_writes(start):
    machine = start("8b07 8907 0107 8b07" + END, "long-cpl3", rdi=DEVICE, rax=0)
    machine.write(DATA, struct.pack("<I", 41))
    machine.vm.set_user_memory_region(1, DEVICE, 0x1000, machine.ram.guest.address + DATA, 2)
    assert machine.trace() == [
        ("write", DEVICE, struct.pack("<I", 41)),
        ("write", DEVICE, struct.pack("<I", 82)),
    ]
    assert machine.regs.rax == 41
    assert machine.word(DATA, 4) == 41


def test_fetch_from_no_slot(start, is_soft):
    machine = start("ffe7", "long-cpl3", rdi=DEVICE)
    stop = machine.run()
    assert isinstance(stop, InternalError)
    if is_soft:
        assert "instruction fetch" in machine.vcpu.arch.last_error


def test_an_access_that_crosses_from_ram_into_the_device(soft):
    machine = soft("488b07" + END, rdi=DEVICE - 4)
    machine.write(DEVICE - 4, b"\x01\x02\x03\x04")
    assert machine.trace(b"\x05\x06\x07\x08") == [("read", DEVICE, b"\x05\x06\x07\x08")]
    assert machine.regs.rax == 0x0807060504030201


def test_an_access_that_crosses_between_device_pages(start):
    machine = start("488b07 48894708" + END, "long-cpl3", rdi=DEVICE + 0xFFC)
    assert machine.trace(b"\x01\x02\x03\x04", b"\x05\x06\x07\x08") == [
        ("read", DEVICE + 0xFFC, b"\x01\x02\x03\x04"),
        ("read", DEVICE + 0x1000, b"\x05\x06\x07\x08"),
        ("write", DEVICE + 0x1004, V8),
    ]


def test_a_guest_exception_in_a_device_access_is_the_guest_s(soft):
    machine = soft("a5" + END, rsi=DEVICE, rdi=DATA)
    machine.change_entry(DATA)
    assert isinstance(machine.run(), Mmio)
    assert isinstance(machine.run(), Shutdown)  # no IDT: a triple fault
    assert machine.vcpu.get_sregs().cr2 == DATA
