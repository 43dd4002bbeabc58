"""Every built-in guest on this machine's KVM, with all of its memory there from the start."""

import ctypes
import mmap
from contextlib import closing

import pytest

from guestfault.errors import Unavailable
from guestfault.guest.boot import entry_state, initial_memory
from guestfault.guest.expect import expect
from guestfault.guest.layout import PAGE_SIZE, Layout, Mode
from guestfault.guest.program import DONE_PORT, READY_PORT, RESULT_PORT
from guestfault.guest.walk import Walk
from guestfault.kvm import KvmSystem
from guestfault.uapi import kvm as uapi


@pytest.fixture(scope="module")
def system():
    try:
        system = KvmSystem()
    except Unavailable as error:
        pytest.skip(str(error))
    with closing(system):
        yield system


def outs(vcpu):
    """Run to the end; the value of each port write, with its port."""
    run = vcpu.kvm_run
    while True:
        assert vcpu.run() == 0
        assert run.exit_reason == uapi.KVM_EXIT_IO
        data = vcpu.run_area[run.io.data_offset :][: run.io.size]
        yield run.io.port, int.from_bytes(data, "little")
        if run.io.port == DONE_PORT:
            return


@pytest.mark.parametrize("walk", Walk)
@pytest.mark.parametrize("mode", Mode)
def test_computes_what_the_host_expects(system, mode, walk):
    layout = Layout(20 * PAGE_SIZE, mode, vcpus=2)
    memory = initial_memory(layout, walk, seed=8)
    expected = expect(layout, walk, memory)
    ram = mmap.mmap(-1, len(memory))
    ram[:] = bytes(memory)
    hva = ctypes.addressof(ctypes.c_char.from_buffer(ram))
    with closing(system.create_vm()) as vm:
        vm.set_user_memory_region(0, 0, len(ram), hva)
        for number, checksum in enumerate(expected.checksums):
            vcpu = vm.create_vcpu(number)
            state = entry_state(layout, number)
            vcpu.set_sregs(state.sregs)
            vcpu.set_regs(state.regs)
            ready, low, high, _ = outs(vcpu)
            assert ready[0] == READY_PORT
            assert low[0] == high[0] == RESULT_PORT
            assert low[1] | high[1] << 32 == checksum
    assert ram[:] == expected.memory
