"""Privileged instructions, on both KVMs where this host's real one can."""

import pytest

from guestfault.fault.outcome import Hlt, InternalError
from guestfault.x86.registers import CR0_TS

END = "e6f4"


@pytest.mark.parametrize("mode", ["real", "long-cpl0"])
def test_hlt(start, mode):
    machine = start("f4" + END, mode)
    assert machine.run() == Hlt()
    assert machine.regs.rip == machine.CODE + 1
    assert machine.trace() == []


@pytest.mark.parametrize(
    ("name", "msr", "value"),
    [
        ("fs base", 0xC0000100, 0x1234_5678_9ABC),
        ("gs base", 0xC0000101, 0x1234_5678_9ABC),
        ("kernel gs base", 0xC0000102, 0x1234_5678_9ABC),
        ("star", 0xC0000081, 0x0023_0010_0000_0000),
        ("lstar", 0xC0000082, 0x1000),
    ],
)
def test_msr_is_what_was_written(start, name, msr, value):
    code = "0f30 31c0 31d2 0f32 48c1e220 4809d0"  # wrmsr; clear; rdmsr; shl rdx, 32; or rax, rdx
    machine = start(code + END, "long-cpl0", rcx=msr, rax=value & 0xFFFFFFFF, rdx=value >> 32)
    assert machine.trace() == []
    assert machine.regs.rax == value


def test_swapgs_exchanges_the_bases(start):
    code = "0f01f8 0f32"  # swapgs; rdmsr of KERNEL_GS_BASE

    def gs_base(sregs):
        sregs.gs.base = 0x1234000

    machine = start(code + END, "long-cpl0", rcx=0xC0000102, sregs=gs_base)
    assert machine.trace() == []
    assert machine.regs.rax == 0x1234000
    assert machine.vcpu.get_sregs().gs.base == 0


@pytest.mark.parametrize("code", ["0f32", "0f30"])
def test_unknown_msr_is_a_general_protection_fault(soft, code):
    machine = soft(code, "long-cpl0", rcx=0x1234_5678)
    machine.gate(13, 0x9000)
    machine.write(0x9000, bytes.fromhex(END))
    assert machine.trace() == []
    assert machine.regs.rip >> 12 == 9


def test_clts(start):
    def task_switched(sregs):
        sregs.cr0 |= CR0_TS

    machine = start("0f06" + END, "long-cpl0", sregs=task_switched)
    assert machine.trace() == []
    assert not machine.vcpu.get_sregs().cr0 & CR0_TS


@pytest.mark.parametrize(("code", "what"), [("0f05", "SYSCALL"), ("0f01f0", "LMSW")])
def test_what_is_not_emulated_says_so(soft, code, what):
    mode = "long-cpl3" if what == "SYSCALL" else "long-cpl0"

    def syscall_enabled(sregs):
        sregs.efer |= 1

    machine = soft(code, mode, sregs=syscall_enabled)
    stop = machine.run()
    assert isinstance(stop, InternalError)
    assert stop.instruction.startswith(bytes.fromhex(code))
    assert what in machine.vcpu.arch.last_error
    assert machine.regs.rip == machine.CODE
