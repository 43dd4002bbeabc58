import errno
import mmap
import os
import resource
import threading

import pytest

from guestfault.errors import KernelError, KvmError
from guestfault.fault.outcome import (
    BareFault,
    Failed,
    Hlt,
    Interrupted,
    Io,
    Mmio,
    RamMmio,
    Shutdown,
)
from guestfault.uapi import kvm as uapi

OUT = bytes.fromhex("66ba1002 b042 ee ebfe")  # mov dx, 0x210; mov al, 0x42; out dx, al; jmp $
IN = bytes.fromhex("e460 e661")  # in al, 0x60; out 0x61, al
LOAD_HOLE = bytes.fromhex("8b042510002000 e601")  # mov eax, [0x200010]; out 1, al
STORE_HOLE = bytes.fromhex("b8efbeadde 89042510002000 e601")  # mov eax, 0xdeadbeef; mov [..], eax
LOAD_DATA = bytes.fromhex("8b042523010800 e601")  # mov eax, [0x80123]; out 1, al
HLT = b"\xf4"


def test_port_output_from_cpl3(machine):
    vcpu = machine.user_vcpu(OUT)
    match machine.run(vcpu):
        case Io(0x210, 1, 1, False, offset):
            assert vcpu.run_area[offset] == 0x42
        case other:
            pytest.fail(f"{other}")


def test_port_input_is_answered_through_the_run_area(machine):
    vcpu = machine.user_vcpu(IN)
    match machine.run(vcpu):
        case Io(0x60, 1, 1, True, offset):
            vcpu.run_area[offset] = 0x99
        case other:
            pytest.fail(f"{other}")
    match machine.run(vcpu):
        case Io(0x61, 1, 1, False, offset):
            assert vcpu.run_area[offset] == 0x99
        case other:
            pytest.fail(f"{other}")


def test_mmio_read_is_answered_through_kvm_run(machine, layout):
    vcpu = machine.user_vcpu(LOAD_HOLE)
    assert machine.run(vcpu) == Mmio(layout.HOLE + 0x10, b"", 4, False)
    vcpu.kvm_run.mmio.data[:4] = b"\x2a\0\0\0"
    assert isinstance(machine.run(vcpu), Io)
    assert vcpu.get_regs().rax == 0x2A


def test_mmio_write_carries_its_bytes(machine, layout):
    vcpu = machine.user_vcpu(STORE_HOLE)
    assert machine.run(vcpu) == Mmio(layout.HOLE + 0x10, b"\xef\xbe\xad\xde", 4, True)


def test_halt_in_real_mode(machine):
    vcpu = machine.real_vcpu(HLT)
    assert machine.run(vcpu) == Hlt()
    assert vcpu.get_regs().rip == 1


def test_triple_fault(machine):
    vcpu = machine.user_vcpu(b"\xcc")  # int3, and no interrupt table
    sregs = vcpu.get_sregs()
    sregs.idt.limit = 0
    vcpu.set_sregs(sregs)
    assert machine.run(vcpu) == Shutdown()


def test_absent_page_is_a_bare_fault_and_the_retry_completes(machine, layout):
    machine.write(layout.DATA + 0x123, b"\x2a\0\0\0")
    machine.guest.protect(layout.DATA, layout.PAGE, 0)
    vcpu = machine.user_vcpu(LOAD_DATA)
    for _ in range(2):
        assert machine.run(vcpu) == BareFault(errno.EFAULT)
        assert vcpu.get_regs().rip == layout.CODE
    machine.guest.protect(layout.DATA, layout.PAGE, mmap.PROT_READ | mmap.PROT_WRITE)
    assert isinstance(machine.run(vcpu), Io)
    assert vcpu.get_regs().rax == 0x2A


def test_absent_page_under_the_emulator_is_ram_mmio(machine, layout):
    """Where the emulator runs real mode; hardware that runs it itself makes a bare fault of it."""
    machine.guest.protect(0x20000, layout.PAGE, 0)
    # mov ax, 0x2000; mov ds, ax; mov ax, [0x123]; hlt
    vcpu = machine.real_vcpu(bytes.fromhex("b80020 8ed8 a12301 f4"))
    assert machine.run(vcpu) in (RamMmio(0x20123, b"", 2, False), BareFault(errno.EFAULT))


def test_immediate_exit_set_by_hand_stays_until_cleared(machine):
    vcpu = machine.user_vcpu(OUT)
    vcpu.kvm_run.immediate_exit = 1
    assert [vcpu.run(), vcpu.run()] == [-errno.EINTR] * 2
    vcpu.kvm_run.immediate_exit = 0
    assert isinstance(machine.run(vcpu), Io)


def test_registers_round_trip(machine):
    vcpu = machine.user_vcpu(OUT)
    regs = vcpu.get_regs()
    regs.r15 = 0x0123_4567_89AB_CDEF
    vcpu.set_regs(regs)
    assert bytes(vcpu.get_regs()) == bytes(regs)
    sregs = vcpu.get_sregs()
    vcpu.set_sregs(sregs)
    assert bytes(vcpu.get_sregs()) == bytes(sregs)


def test_bad_system_registers_are_refused(machine):
    vcpu = machine.user_vcpu(OUT)
    sregs = vcpu.get_sregs()
    sregs.cr4 = 0  # paging in long mode needs CR4.PAE
    with pytest.raises(KvmError, match="vCPU 0, cr0 0x80000033, cr4 0x0") as caught:
        vcpu.set_sregs(sregs)
    assert (caught.value.call, caught.value.errno) == ("KVM_SET_SREGS", errno.EINVAL)


def test_translate(machine, layout):
    vcpu = machine.user_vcpu(OUT)
    found = vcpu.translate(layout.HOLE_GVA + 0x123)
    assert (found.valid, found.physical_address) == (1, layout.HOLE + 0x123)
    assert vcpu.translate(0x4000_0000).valid == 0


def test_pre_fault(machine, layout):
    vcpu = machine.user_vcpu(LOAD_DATA)
    if machine.vm.check_extension(uapi.KVM_CAP_PRE_FAULT_MEMORY):
        vcpu.pre_fault(0, layout.RAM_SIZE)
        assert isinstance(machine.run(vcpu), Io)
    else:
        with pytest.raises(KvmError, match=r"vCPU 0, \[0x0, 0x200000\)"):
            vcpu.pre_fault(0, layout.RAM_SIZE)


def test_vcpu_may_change_threads(machine):
    vcpu = machine.user_vcpu(IN)
    outcomes = []
    outcomes.append(machine.run(vcpu))
    thread = threading.Thread(target=lambda: outcomes.append(machine.run(vcpu)))
    thread.start()
    thread.join(10)
    assert [type(o) for o in outcomes] == [Io, Io]
    assert [o.port for o in outcomes] == [0x60, 0x61]


def test_closed_vcpu_shows_its_last_state(machine):
    vcpu = machine.user_vcpu(OUT)
    machine.run(vcpu)
    vcpu.close()
    vcpu.close()
    vcpu.kick()  # a late kick finds nothing to kick, and harms nothing
    assert vcpu.kvm_run.io.port == 0x210
    assert vcpu.run() == -errno.EBADF
    assert machine.run(vcpu) == Failed(errno.EBADF)


def test_view_held_past_close_stays_readable(machine):
    vcpu = machine.user_vcpu(OUT)
    machine.run(vcpu)
    run, area = vcpu.kvm_run, vcpu.run_area
    machine.vm.close()
    assert run.io.port == 0x210
    assert area[run.io.data_offset] == 0x42


def test_run_does_not_hold_the_gil(machine):
    vcpu = machine.user_vcpu(b"\xeb\xfe")  # jmp $
    results = []
    thread = threading.Thread(target=lambda: results.append(machine.run(vcpu)))
    thread.start()
    total = sum(range(100_000))  # this thread gets on although the guest spins
    vcpu.kick()
    thread.join(10)
    assert results == [Interrupted()]
    assert total == 4_999_950_000


MSR_STAR, MSR_LSTAR, NO_MSR = 0xC0000081, 0xC0000082, 0x4B56_4DFF


def test_msrs_are_read_and_written_by_index(machine):
    vcpu = machine.user_vcpu(OUT)
    vcpu.set_msrs({MSR_STAR: 0x10_0000_0000, MSR_LSTAR: 0xFFFF_8000_0000_1000})
    assert vcpu.get_msrs([MSR_LSTAR, MSR_STAR]) == {
        MSR_LSTAR: 0xFFFF_8000_0000_1000,
        MSR_STAR: 0x10_0000_0000,
    }
    assert vcpu.get_msrs([]) == {}


def test_an_msr_that_there_is_not_is_named_and_those_before_it_are_written(machine):
    vcpu = machine.user_vcpu(OUT)
    with pytest.raises(KvmError, match=f"{NO_MSR:#x}") as caught:
        vcpu.set_msrs({MSR_LSTAR: 0x1000, NO_MSR: 0, MSR_STAR: 0x10_0000_0000})
    assert (caught.value.call, caught.value.errno) == ("KVM_SET_MSRS", errno.EINVAL)
    assert vcpu.get_msrs([MSR_LSTAR, MSR_STAR]) == {MSR_LSTAR: 0x1000, MSR_STAR: 0}
    with pytest.raises(KvmError, match=f"{NO_MSR:#x}"):
        vcpu.get_msrs([MSR_LSTAR, NO_MSR])


def test_mp_state(machine):
    vcpu = machine.user_vcpu(OUT)
    assert vcpu.get_mp_state() == uapi.KVM_MP_STATE_RUNNABLE
    vcpu.set_mp_state(uapi.KVM_MP_STATE_RUNNABLE)
    with pytest.raises(KvmError, match="state 99"):
        vcpu.set_mp_state(99)


def test_failed_creation_leaves_nothing_open(machine):
    before = sorted(os.listdir("/proc/self/fd"), key=int)
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    # Room for the vCPU's descriptor, and none for the second that mapping it takes.
    free = min(set(range(1000)) - {fd for fd in range(1000) if _is_open(fd)})
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + 1, limits[1]))
    try:
        with pytest.raises(KernelError) as caught:
            machine.vm.create_vcpu(0)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert (caught.value.call, caught.value.errno) == ("mmap", errno.EMFILE)
    assert sorted(os.listdir("/proc/self/fd"), key=int) == before


def _is_open(fd):
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True
