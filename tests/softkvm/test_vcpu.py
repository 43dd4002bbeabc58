"""A vCPU as its owner sees it: registers, modes, exits that nobody asked for, kicks."""

import errno
import itertools
import random
import struct
import threading

import pytest
from tests.softkvm.modelled_mm import at

from guestfault.errors import KvmError
from guestfault.fault.outcome import Interrupted, Io
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import (
    CR0_NW,
    CR0_PE,
    CR0_PG,
    CR4_PAE,
    EFER_LMA,
    EFER_LME,
)
from guestfault.x86.segments import FLAT_GDT

END = "e6f4"
DATA = 0x4_0000
FOREVER = "ebfe"
GENERAL = [name for name, _ in uapi.kvm_regs._fields_ if name not in ("rip", "rflags")]


# -- registers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["real", "long-cpl0", "long-cpl3"])
def test_registers_come_back_as_they_were_set(start, mode):
    machine = start(END, mode)
    rng = random.Random(1)
    regs = uapi.kvm_regs(**{name: rng.getrandbits(64) for name in GENERAL}, rip=0x8000, rflags=0x46)
    machine.vcpu.set_regs(regs)
    assert bytes(machine.vcpu.get_regs()) == bytes(regs)


def test_all_general_registers_reach_the_guest(start):
    # add each register to the next, in a ring, with REX prefixes for r8 to r15
    order = ["rax", "rcx", "rdx", "rbx", "rbp", "rsi", "rdi", *(f"r{i}" for i in range(8, 16))]
    number = {"rax": 0, "rcx": 1, "rdx": 2, "rbx": 3, "rbp": 5, "rsi": 6, "rdi": 7}
    number |= {f"r{i}": i for i in range(8, 16)}
    code = b""
    for source, to in itertools.pairwise(order):
        s, t = number[source], number[to]
        code += bytes([0x48 | (s >> 3) << 2 | t >> 3, 0x01, 0xC0 | (s & 7) << 3 | t & 7])
    values = {name: 1 << i for i, name in enumerate(order)}
    machine = start(code.hex() + END, "long-cpl3", **values)
    assert machine.trace() == []
    for i, name in enumerate(order):
        assert getattr(machine.regs, name) == (2 << i) - 1


def test_setting_the_system_registers_keeps_all_others(soft):
    """Which VMRUN resets, and the processor's own exits from guest mode too."""
    # movups xmm0, [rsi]; movups xmm15, [rsi]; fld1; fldpi; ldmxcsr [rsi+16]
    load = "0f1006 440f103e d9e8 d9eb 0fae5610"
    # movups [rdi], xmm0; movups [rdi+16], xmm15; fstp [rdi+32]; fstp [rdi+40]; stmxcsr [rdi+48]
    store = "0f1107 440f117f10 dd5f20 dd5f28 0fae5f30"
    machine = soft(load + END + store + END, rsi=DATA, rdi=DATA + 0x100)
    machine.write(DATA, bytes(range(16)) + struct.pack("<I", 0x1FA0))
    assert machine.trace() == []
    before = machine.regs
    machine.vcpu.set_sregs(machine.vcpu.get_sregs())
    assert bytes(machine.regs) == bytes(before)
    assert machine.trace() == []
    stored = machine.bytes[DATA + 0x100 : DATA + 0x134]
    assert stored[:32] == bytes(range(16)) * 2
    assert struct.unpack("<dd", stored[32:48]) == (3.141592653589793, 1.0)
    assert struct.unpack("<I", stored[48:]) == (0x1FA0,)


def test_debug_registers_survive_a_change_of_the_system_registers(soft):
    machine = soft("0f23c0" + END + "0f21c3" + END, "long-cpl0", rax=0x12345678)
    assert machine.trace() == []
    machine.vcpu.set_sregs(machine.vcpu.get_sregs())
    assert machine.trace() == []
    assert machine.regs.rbx == 0x12345678


def test_system_registers_come_back_as_they_were_set(soft):
    machine = soft(END)
    before = machine.vcpu.get_sregs()
    assert machine.trace() == []
    after = machine.vcpu.get_sregs()
    for name, *_ in uapi.kvm_sregs._fields_:
        if name != "cr2":
            assert bytes(memoryview_of(before, name)) == bytes(memoryview_of(after, name)), name


def memoryview_of(structure, name):
    field = getattr(type(structure), name)
    return bytes(structure)[field.offset : field.offset + field.size]


def test_a_segment_that_the_guest_loads_is_seen(start):
    machine = start("b82300 0000 8ed8 8ec0" + END, "long-cpl3")
    assert machine.trace() == []
    sregs = machine.vcpu.get_sregs()
    assert (sregs.ds.selector, sregs.es.selector) == (0x23, 0x23)
    assert (sregs.ds.dpl, sregs.ds.s, sregs.ds.present) == (3, 1, 1)


def test_real_mode_segment_load_sets_the_base(start):
    machine = start("b83412 8ed8" + END, "real")
    assert machine.trace() == []
    assert machine.vcpu.get_sregs().ds.base == 0x12340


def test_reset_state(soft):
    vcpu = soft().vm.create_vcpu(1)
    regs, sregs = vcpu.get_regs(), vcpu.get_sregs()
    assert (regs.rip, regs.rflags) == (0xFFF0, 2)
    assert (sregs.cs.base, sregs.cr0) == (0xFFFF_0000, 0x6000_0010)
    vcpu.close()


@pytest.mark.parametrize(
    "change",
    [
        {"efer": EFER_LME, "cr0": CR0_PE | CR0_PG, "cr4": 0},
        {"efer": EFER_LME, "cr0": CR0_PE | CR0_PG, "cr4": CR4_PAE},
        {"efer": EFER_LME | EFER_LMA, "cr0": CR0_PE, "cr4": CR4_PAE},
        {"efer": 0, "cr0": CR0_PG, "cr4": 0},
        {"cr0": CR0_PE | CR0_PG | CR0_NW},
        {"cr0": CR0_PE | CR0_PG | 1 << 40},
    ],
    ids=["no PAE", "no LMA", "LMA without paging", "paging without PE", "NW without CD", "high"],
)
def test_system_registers_that_cannot_be(start, change):
    machine = start(END, "long-cpl3")
    sregs = machine.vcpu.get_sregs()
    before = bytes(sregs)
    for name, value in change.items():
        setattr(sregs, name, value)
    with pytest.raises(KvmError) as caught:
        machine.vcpu.set_sregs(sregs)
    assert caught.value.errno == errno.EINVAL
    assert bytes(machine.vcpu.get_sregs()) == before


# -- modes -----------------------------------------------------------------------------------------


def test_from_real_mode_into_long_mode_and_on_to_cpl3(soft):
    """A guest that does by itself what other tests have done for them."""
    long_code, user_code = 0x9000, 0xA000
    boot = (
        "0f01160050"  # lgdt [0x5000]
        "0f20e0 660d20000000 0f22e0"  # cr4 |= PAE
        "66b800000100 0f22d8"  # cr3
        "66b9800000c0 0f32 660d00010000 0f30"  # EFER.LME
        "66b831000080 0f22c0"  # cr0: PG, NE, ET... and PE
        "66ea00900000 0800"  # ljmp 8:long_code
    )
    machine = soft(boot, "real")
    machine.write(0x5000, struct.pack("<HI", 55, 0x5010))
    machine.write(0x5010, FLAT_GDT)
    # push 0x23; push 0xe000; push 0x3002; push 0x2b; push user_code; iretq
    machine.write(long_code, bytes.fromhex("6a23 6800e00000 6802300000 6a2b 6800a00000 48cf"))
    machine.write(user_code, bytes.fromhex("b83713000066" + "90" + END))
    for table in (0x1_0000, 0x1_1000, 0x1_2000):  # user rights on the way down
        machine.write(table, struct.pack("<Q", machine.word(table) | 4))
    for gva in (user_code,):
        machine.change_entry(gva, clear=0, add=4)
    assert machine.trace() == []
    assert machine.regs.rax == 0x1337
    assert machine.regs.rsp == 0xE000
    sregs = machine.vcpu.get_sregs()
    assert sregs.efer & EFER_LMA
    assert sregs.cs.l == 1
    assert sregs.cs.selector == 0x2B
    assert sregs.ss.selector == 0x23


def test_cr3_written_by_the_guest_changes_what_it_sees(soft):
    machine = soft("488b07 0f22d9 488b1f" + END, "long-cpl0", rdi=DATA, rcx=0x1_8000)
    machine.write(DATA, b"old page")
    machine.write(DATA + 0x1000, b"new page")
    machine.write(
        0x1_8000, bytes(machine.bytes[0x1_0000:0x1_1000])
    )  # a second root: the same tables
    pd, pt = 0x1_9000, 0x1_A000
    pdpt = 0x1_B000
    machine.write(pdpt, struct.pack("<Q", pd | 3))
    machine.write(pd, struct.pack("<Q", pt | 3))
    machine.write(0x1_8000, struct.pack("<Q", pdpt | 3))
    for page in range(512):
        machine.write(pt + 8 * page, struct.pack("<Q", page << 12 | 3))
    machine.write(pt + 8 * (DATA >> 12), struct.pack("<Q", DATA + 0x1000 | 3))
    assert machine.trace() == []
    assert machine.regs.rax == int.from_bytes(b"old page", "little")
    assert machine.regs.rbx == int.from_bytes(b"new page", "little")


# -- translation -----------------------------------------------------------------------------------


def test_translate(start):
    machine = start(END, "long-cpl3")
    found = machine.vcpu.translate(DATA + 5)
    assert (found.physical_address, found.valid) == (DATA + 5, 1)
    machine.change_entry(DATA + 0x1000)
    machine.change_entry(DATA + 0x2000, clear=~0, add=0x12_3007)
    assert not machine.vcpu.translate(DATA + 0x1000).valid
    assert machine.vcpu.translate(DATA + 0x2008).physical_address == 0x12_3008
    assert not machine.vcpu.translate(0x7000_0000).valid


def test_translate_does_not_change_the_tables(soft):
    machine = soft(END, accessed=False)
    before = machine.word(machine.entry_at(DATA))
    assert machine.vcpu.translate(DATA).valid
    assert machine.word(machine.entry_at(DATA)) == before


def test_translate_finds_tables_that_cannot_be_written(soft):
    """NPT could not: to it a walk writes."""
    machine = soft(END, flags=uapi.KVM_MEM_READONLY)
    assert machine.vcpu.translate(DATA).physical_address == DATA
    assert not machine.vm.kvm.second_stage.sptes


# -- kicks -----------------------------------------------------------------------------------------


def test_immediate_exit_leaves_the_exit_reason(start):
    machine = start("e642" + END, "long-cpl3")
    assert isinstance(machine.run(), Io)
    machine.vcpu.kvm_run.immediate_exit = 1
    assert machine.vcpu.run() == -errno.EINTR
    assert machine.vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_IO
    assert machine.vcpu.kvm_run.immediate_exit == 1  # userspace's to clear
    assert machine.regs.rip == machine.CODE + 2  # the last exit was completed
    machine.vcpu.kvm_run.immediate_exit = 0
    assert machine.trace() == []


COPY = "kvm_vcpu_write_guest_page: copy_to_user"


def test_immediate_exit_is_read_as_the_run_begins(soft):
    """What userspace says of it while the last exit is completed is for the next run."""
    machine = soft("6d" + END, rdi=DATA, rdx=0x80)  # ins
    run = machine.vcpu.kvm_run
    assert isinstance(machine.run(), Io)
    with at(COPY, lambda: setattr(run, "immediate_exit", 1)):
        assert isinstance(machine.run(), Io)
    assert machine.vcpu.run() == -errno.EINTR
    assert run.exit_reason == uapi.KVM_EXIT_IO

    run.immediate_exit = 0
    machine.vcpu.set_regs(uapi.kvm_regs(rip=machine.CODE, rdi=DATA, rdx=0x80, rflags=0x3002))
    assert isinstance(machine.run(), Io)
    run.immediate_exit = 1
    with at(COPY, lambda: setattr(run, "immediate_exit", 0)):
        assert machine.vcpu.run() == -errno.EINTR
    assert machine.regs.rip == machine.CODE + 1


def test_a_kick_while_an_exit_is_completed_is_a_signal(soft):
    """It is answered by this run, and exit_reason says so: the conform case missing/ins."""
    machine = soft("6d" + END, rdi=DATA, rdx=0x80)
    assert isinstance(machine.run(), Io)
    with at(COPY, machine.vcpu.kick):
        assert machine.vcpu.run() == -errno.EINTR
    run = machine.vcpu.kvm_run
    assert (run.exit_reason, run.immediate_exit) == (uapi.KVM_EXIT_INTR, 0)
    assert machine.regs.rip == machine.CODE + 1
    assert machine.trace() == []


def test_a_kick_before_a_run_ends_it(start):
    machine = start(END, "long-cpl3")
    machine.vcpu.kick()
    assert isinstance(machine.run(), Interrupted)
    assert machine.vcpu.kvm_run.immediate_exit == 0
    assert machine.trace() == []


def test_a_kick_ends_a_guest_that_never_exits(start, background, is_soft):
    machine = start(FOREVER, "long-cpl3")
    run = background(machine.run)
    assert run.is_running()
    machine.vcpu.kick()
    assert isinstance(run.result(5), Interrupted)
    if is_soft:
        assert machine.vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_INTR


def test_every_kick_is_answered(start, background):
    """Kicks at random moments, as fast as they are answered: none may be lost."""
    machine = start(FOREVER, "long-cpl3")
    answered = threading.Event()
    done = threading.Event()

    def run():
        while not done.is_set():
            if machine.vcpu.run() == -errno.EINTR:
                answered.set()

    runner = background(run)
    rng = random.Random(2)
    for _ in range(200):
        answered.clear()
        for _ in range(rng.randrange(1, 4)):
            machine.vcpu.kick()
        assert answered.wait(5), "a kick was lost"
        threading.Event().wait(rng.random() / 2000)
    done.set()
    machine.vcpu.kick()
    runner.result()


def test_kicks_do_not_disturb_device_accesses(soft, background):
    """Each read of the device is asked for once, whatever hits the vCPU in the middle of it."""
    machine = soft("8b07 ff07 48ffc9 75f7" + END, rdi=0x20_0000, rcx=150)
    stop = threading.Event()

    def kick():
        while not stop.is_set():
            machine.vcpu.kick()
            stop.wait(0.0002)

    kicker = background(kick)
    reads, writes, turn = 0, [], 0
    while not isinstance(machine.run(), Io):
        run = machine.vcpu.kvm_run
        if run.exit_reason != uapi.KVM_EXIT_MMIO:
            continue
        if run.mmio.is_write:
            writes.append(struct.unpack("<I", bytes(run.mmio.data[:4]))[0])
        elif turn == reads:
            run.mmio.data[:4] = struct.pack("<I", reads)
            reads += 1
            turn = reads
        run.exit_reason = uapi.KVM_EXIT_UNKNOWN
    stop.set()
    kicker.result()
    assert reads == 300
    assert writes == [2 * i + 2 for i in range(150)]


def test_only_one_run_at_a_time_and_closing_is_final(soft):
    machine = soft(END)
    machine.vcpu.close()
    machine.vcpu.close()
    assert machine.vcpu.run() == -errno.EBADF
    assert machine.vcpu.kvm_run.exit_reason == 0
    machine.vcpu.kick()


def test_what_a_hook_raises_comes_out_of_the_run(soft, monkeypatch):
    """A signal handler that raises, KeyboardInterrupt above all, may run in the midst of a hook."""
    machine = soft(END)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("guestfault.softkvm.vcpu.tlb_fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        machine.vcpu.run()
    monkeypatch.undo()
    assert machine.trace() == []
