"""The accesses of an instruction that KVM carries out: what userspace is asked, and gets."""

import struct

import pytest

from guestfault.fault.outcome import (
    BareFault,
    InternalError,
    MemoryFault,
    Mmio,
    RamMmio,
    Shutdown,
)
from guestfault.softkvm.page_track import (
    kvm_page_track_register_notifier,
    kvm_slot_page_track_add_page,
)
from guestfault.uapi.mman import PROT_NONE

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


def test_rip_is_on_a_read_and_past_a_write(start):
    machine = start("8b07 8907" + END, "long-cpl3", rdi=DEVICE)
    assert isinstance(machine.run(), Mmio)
    assert machine.regs.rip == machine.CODE
    assert machine.run() == Mmio(DEVICE, bytes(4), 4, True)
    assert machine.regs.rip == machine.CODE + 4


def test_the_flags_of_a_read_modify_write_are_the_operation_s(start):
    machine = start("0107 9c 58" + END, "long-cpl3", rdi=DEVICE, rax=1)
    machine.trace(b"\xff\xff\xff\xff")
    assert machine.regs.rax & 0x41 == 0x41  # carry and zero
    assert not machine.regs.rax & 0x100  # and no trace of the single step


@pytest.mark.parametrize("mode", MODES)
def test_movs_from_a_device_to_an_absent_page(start, mode):
    """The store fails as KVM makes it, and is userspace's: the guest's own fault it never is."""
    machine = start("a5" + END, mode, rsi=DEVICE, rdi=DATA)
    machine.ram.guest.protect(DATA, 4096, PROT_NONE)
    assert machine.run() == Mmio(DEVICE, b"", 4, False)
    machine.vcpu.kvm_run.mmio.data[:4] = b"abcd"
    assert machine.run() == RamMmio(DATA, b"abcd", 4, True)
    assert machine.trace() == []


@pytest.mark.parametrize("mode", MODES)
def test_movs_from_an_absent_page_to_a_device(start, mode):
    machine = start("a5" + END, mode, rsi=DATA, rdi=DEVICE)
    machine.write(DATA, b"abcd")
    assert machine.trace() == [("write", DEVICE, b"abcd")]
    machine = start("a5" + END, mode, rsi=DATA, rdi=DEVICE)
    machine.write(DATA, b"abcd")
    machine.ram.guest.protect(DATA, 4096, PROT_NONE)
    stop = machine.run()
    if isinstance(stop, BareFault | MemoryFault):
        return  # the processor read first, and never came to the device
    assert stop == RamMmio(DATA, b"", 4, False)
    machine.vcpu.kvm_run.mmio.data[:4] = b"abcd"
    assert machine.trace() == [("write", DEVICE, b"abcd")]


def test_a_page_that_only_has_to_be_brought_in_is_no_failure(soft):
    """Though its slot exits on a missing page: that is for the guest's own faults."""
    machine = soft("a5" + END, flags=4, rsi=DEVICE, rdi=DATA)
    machine.bring_in(0, DATA)
    assert machine.trace(b"1111") == [("read", DEVICE, b"1111")]
    assert machine.bytes[DATA : DATA + 4] == b"1111"


def test_a_device_is_read_once_however_often_the_instruction_is_begun(soft):
    machine = soft("a7" + END, rsi=DEVICE, rdi=DEVICE + 8)
    assert machine.trace(b"1111", b"2222") == expect([("read", 0, b"1111"), ("read", 8, b"2222")])


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


def test_an_access_that_crosses_from_ram_into_the_device(start):
    machine = start("488b07" + END, "long-cpl3", rdi=DEVICE - 4)
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


def test_sixteen_bytes_across_two_pages_are_two_fragments(start):
    """The first ends with the page; the other goes on in pieces of eight."""
    machine = start("0f1007 0f1107" + END, "long-cpl3", rdi=DEVICE + 0xFFC)
    a, b, c = b"abcd", V8, b"efgh"
    seen = [(0xFFC, a), (0x1000, b), (0x1008, c)]
    assert machine.trace(a, b, c) == expect(
        [("read", *one) for one in seen] + [("write", *one) for one in seen]
    )


@pytest.mark.parametrize("mode", MODES)
def test_cmps_asks_for_its_source_first(start, mode):
    """Unlike the engine, which reads the destination first."""
    machine = start("a7 9c 58" + END, mode, rsi=DEVICE, rdi=DEVICE + 8)
    assert machine.trace(b"\1\0\0\0", b"\2\0\0\0") == expect(
        [("read", 0, b"\1\0\0\0"), ("read", 8, b"\2\0\0\0")]
    )
    assert machine.regs.rax & 1  # carry: the source is less


def test_cmps_of_a_device_with_itself(start):
    machine = start("a6 9c 58" + END, "long-cpl3", rsi=DEVICE, rdi=DEVICE)
    assert machine.trace(b"\2", b"\1") == expect([("read", 0, b"\2"), ("read", 0, b"\1")])
    assert not machine.regs.rax & 1


@pytest.mark.parametrize("code", ["f00107", "8707"], ids=["lock add", "xchg"])
def test_an_atomic_access_to_an_absent_page_cannot_be_emulated(start, is_soft, code):
    """The read is asked of userspace; the exchange is one with memory, or nothing.

    At CPL 0, where this host's KVM emulates all there is.
    """
    machine = start(code + END, "long-cpl0", rdi=DATA)
    if is_soft:
        _emulate_writes_to(machine, DATA, absent=True)
    else:
        machine.ram.guest.protect(DATA, 4096, PROT_NONE)
    assert machine.run() == RamMmio(DATA, b"", 4, False)
    stop = machine.run()
    assert isinstance(stop, InternalError)
    assert stop.instruction.startswith(bytes.fromhex(code))


def test_an_exchange_with_a_device_is_two_accesses(start):
    machine = start("8707" + END, "long-cpl3", rdi=DEVICE, rax=7)
    assert machine.trace(V8[:4]) == expect([("read", 0, V8[:4]), ("write", 0, b"\7\0\0\0")])


class AbsentPage:
    """The host's memory, but for one page, which KVM cannot copy from or to."""

    def __init__(self, mm, page):
        self._mm, self._page = mm, page

    def copy_from_user(self, hva, size):
        return None if hva & -4096 == self._page else self._mm.copy_from_user(hva, size)

    def copy_to_user(self, hva, data):
        return hva & -4096 != self._page and self._mm.copy_to_user(hva, data)

    def __getattr__(self, name):
        return getattr(self._mm, name)


def _emulate_writes_to(machine, gpa, *, absent=False):
    """Have KVM itself make the guest's writes to a page, as if it were a shadowed table."""
    _track(machine, gpa)
    if absent:
        kvm = machine.vm.kvm
        kvm.mm = AbsentPage(kvm.mm, machine.ram.guest.address + gpa)


def _track(machine, gpa):
    kvm = machine.vm.kvm
    slot = kvm.memslots.gfn_to_memslot(gpa >> 12)
    with kvm.second_stage.mmu_lock:
        kvm_slot_page_track_add_page(kvm, slot, gpa >> 12)


class Tracker:
    """A notifier that remembers."""

    def __init__(self):
        self.seen = []

    def track_write(self, _vcpu, gpa, data):
        self.seen.append((gpa, data))

    def track_flush_slot(self, _slot):
        pass


def test_a_write_to_a_tracked_page_is_made_and_told(soft):
    machine = soft("8b07 8907 0107" + END, rdi=DATA + 4, rax=0)
    machine.write(DATA + 4, struct.pack("<I", 21))
    tracker = Tracker()
    kvm_page_track_register_notifier(machine.vm.kvm, tracker)
    _emulate_writes_to(machine, DATA)
    assert machine.trace() == []
    assert machine.word(DATA + 4, 4) == 42
    assert tracker.seen == [(DATA + 4, struct.pack("<I", n)) for n in (21, 42)]


def test_a_write_to_a_tracked_page_that_is_absent_is_userspace_s(soft):
    """The third shape with no device anywhere near."""
    machine = soft("8907" + END, rdi=DATA, rax=0x64636261)
    _emulate_writes_to(machine, DATA, absent=True)
    assert machine.run() == RamMmio(DATA, b"abcd", 4, True)
    assert machine.trace() == []


def test_a_guest_exception_in_a_device_access_is_the_guest_s(start):
    machine = start("a5" + END, "long-cpl3", rsi=DEVICE, rdi=DATA)
    machine.change_entry(DATA)
    assert isinstance(machine.run(), Mmio)
    assert isinstance(machine.run(), Shutdown)  # no IDT: a triple fault
    assert machine.vcpu.get_sregs().cr2 == DATA


def test_the_address_of_a_page_fault_is_the_access_s_to_the_byte(soft):
    machine = soft("a5" + END, rsi=DEVICE, rdi=DATA + 0x123)
    machine.change_entry(DATA)
    assert isinstance(machine.run(), Mmio)
    assert isinstance(machine.run(), Shutdown)
    assert machine.vcpu.get_sregs().cr2 == DATA + 0x123


def test_a_page_fault_in_the_second_page_comes_after_the_first_is_written(soft):
    """KVM's own writes are not undone, where a processor's would not have been made."""
    machine = soft("48 a5" + END, rsi=DEVICE, rdi=DATA + 0xFFC)
    machine.change_entry(DATA + 0x1000)
    assert isinstance(machine.run(), Mmio)
    machine.vcpu.kvm_run.mmio.data[:8] = V8
    assert isinstance(machine.run(), Shutdown)
    assert machine.vcpu.get_sregs().cr2 == DATA + 0x1000
    assert machine.bytes[DATA + 0xFFC : DATA + 0x1000] == V8[:4]


def test_a_table_that_cannot_be_read_looks_like_a_page_that_is_not_present(soft):
    """The walk for the operand that did not fault; the processor's own walk would have exited."""
    machine = soft("a5" + END, rsi=DEVICE, rdi=3 << 21)
    table = 0x7_0000
    machine.write(0x1_2000 + 8 * 3, struct.pack("<Q", table | 7))
    machine.write(table, struct.pack("<Q", DATA | 0x67))
    assert machine.run() == Mmio(DEVICE, b"", 4, False)
    machine.ram.guest.protect(table, 4096, PROT_NONE)
    assert isinstance(machine.run(), Shutdown)
    assert machine.vcpu.get_sregs().cr2 == 3 << 21


def test_the_walk_sets_accessed_and_dirty(soft):
    machine = soft("a5" + END, rsi=DEVICE, rdi=DATA, accessed=False)
    machine.trace(b"abcd")
    assert machine.word(machine.entry_at(DATA)) & 0x60 == 0x60


def test_a_write_of_the_emulator_is_in_the_dirty_log(soft):
    machine = soft("a5" + END, flags=1, rsi=DEVICE, rdi=DATA)
    machine.trace(b"abcd")
    log = machine.vm.get_dirty_log(0)
    assert log[DATA >> 15] >> (DATA >> 12 & 7) & 1


def test_a_non_canonical_stack_is_a_stack_fault(soft):
    """PUSH from a device: KVM reads, and then cannot write."""
    machine = soft("ff37", "long-cpl0", rdi=DEVICE, rsp=(1 << 47) + 8)
    for vector in (12, 13):
        machine.gate(vector, 0x9000 + vector * 16, ist=1)
        machine.write(0x9000 + vector * 16, bytes.fromhex(END))
    machine.trace(V8)
    assert machine.regs.rip >> 4 == 0x9000 + 12 * 16 >> 4
