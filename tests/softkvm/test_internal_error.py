"""What comes with KVM_EXIT_INTERNAL_ERROR: the instruction, and the processor's account."""

import pytest

from guestfault.fault.outcome import InternalError, Mmio
from guestfault.softkvm.internal_error import ExitInfo, exit_info, prepare_emulation_failure_exit
from guestfault.softkvm.vmcb import SvmExit
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import (
    PFERR_FETCH_MASK,
    PFERR_GUEST_FINAL_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
    UD_VECTOR,
)

END = "e6f4"
DEVICE = 0x20_0000
NPF, PF = 0x400, 0x4E
MMIO_ENTRY = PFERR_PRESENT_MASK | PFERR_RSVD_MASK


@pytest.fixture
def account(tdp_enabled):
    """``account(code, address)``: EXITCODE, EXITINFO1 and EXITINFO2 of a supervisor's fault."""

    def make(code, address):
        if tdp_enabled:  # to which every access is a user's
            return NPF, code | PFERR_GUEST_FINAL_MASK | PFERR_USER_MASK, address
        return PF, code, address

    return make


def stack(base):
    def change(sregs):
        sregs.ss.base = base

    return change


# -- an instruction that is not emulated -----------------------------------------------------------


@pytest.mark.parametrize("mode", ["long-cpl0", "real"])
def test_code_that_is_nowhere(soft, account, mode):
    jump = {"long-cpl0": "ffe7", "real": "ea20010020"}[mode]  # jmp rdi; jmp 0x2000:0x120
    machine = soft(jump, mode, rdi=DEVICE + 0x120)
    if mode == "real":
        address = machine.vm.kvm.memslots.slots[0].userspace_addr
        machine.vm.set_user_memory_region(0, 0, 0, 0)
        machine.vm.set_user_memory_region(0, 0, 0x1_0000, address)
    at = DEVICE + 0x120 if mode == "long-cpl0" else 0x2_0120
    end = machine.run()
    assert isinstance(end, InternalError)
    assert end.instruction == b""
    assert end.data == (0, *account(PFERR_FETCH_MASK, at), 0, 0)


def test_the_address_is_that_of_the_access(soft, account):
    """The engine says no more than the page: the rest is the instruction's."""
    machine = soft("c8000003" + END, "real", sregs=stack(DEVICE), rsp=0x100, rbp=0x80)  # enter
    end = machine.run()
    assert isinstance(end, InternalError)
    assert end.instruction.startswith(bytes.fromhex("c8000003" + END))
    assert end.data[3:] == (*account(PFERR_WRITE_MASK, DEVICE + 0xFE), 0, 0)


def test_the_second_time_there_is_an_entry(soft, account):
    code = "ff37" + "c8000003" + END  # push word [bx], and enter, both on the device
    machine = soft(code, "real", sregs=stack(DEVICE), rsp=0x100, rbx=0x4000)
    assert isinstance(machine.run(), Mmio)
    end = machine.run()
    assert isinstance(end, InternalError)
    assert end.data[3:] == (*account(PFERR_WRITE_MASK | MMIO_ENTRY, DEVICE + 0xFC), 0, 0)


def test_what_was_not_fetched_is_filled_with_nops(soft):
    machine = soft()
    vcpu = machine.vcpu.arch
    vcpu.exit_code = int(SvmExit.MSR)
    machine.poison_union()
    prepare_emulation_failure_exit(vcpu, b"\x0f\x32", exit_info(vcpu, None))
    failure = vcpu.run.emulation_failure
    assert (failure.ndata, failure.flags, failure.insn_size) == (8, 1, 2)
    assert bytes(failure.insn_bytes) == b"\x0f\x32".ljust(15, b"\x90")
    assert tuple(vcpu.run.internal.data[3:8]) == ExitInfo(0x7C) == (0x7C, 0, 0, 0, 0)
    assert machine.union()[8 + 8 * 8 :] == b"\xa5" * (256 - 72)


# -- an event that is not delivered ----------------------------------------------------------------


@pytest.mark.parametrize(("mode", "word"), [("long-cpl0", 8), ("long-cpl3", 8), ("real", 2)])
def test_a_frame_on_a_device(soft, account, mode, word):
    """The address is that of the first push, and at CPL 3 the access is a supervisor's too."""
    machine = soft("0f0b", mode, rsp=0x800, sregs=None if mode != "real" else stack(DEVICE))
    machine.gate(UD_VECTOR, 0x9000)
    top = DEVICE + 0x800
    if mode == "long-cpl0":
        regs = machine.regs
        regs.rsp = top
        machine.vcpu.set_regs(regs)
    elif mode == "long-cpl3":
        machine.write(machine.TSS + 4, top.to_bytes(8, "little"))  # RSP0
    reason, code, address = account(PFERR_WRITE_MASK, top - word)
    for again in (0, MMIO_ENTRY):
        machine.poison_union()
        end = machine.run()
        assert isinstance(end, InternalError)
        assert end.suberror == uapi.KVM_INTERNAL_ERROR_DELIVERY_EV
        assert end.data == (address, reason, code | again, address, 0)
        assert machine.union()[8 + 5 * 8 :] == b"\xa5" * (256 - 48)


def test_a_frame_across_two_pages_is_pushed_from_its_top(soft, account):
    machine = soft("0f0b", "long-cpl0", rsp=DEVICE + 0x1010)
    machine.gate(UD_VECTOR, 0x9000)
    for present in (DEVICE + 0x1008, DEVICE + 0xFF8):
        end = machine.run()
        assert isinstance(end, InternalError)
        assert end.data[0] == account(0, present)[2]
        page = present & -4096
        ram = machine.ram.guest.address + 0x4_0000
        machine.vm.set_user_memory_region(page >> 12, page, 0x1000, ram)
