"""Events in real mode through KVM's emulator, as on VMX without unrestricted guest."""

import struct
from dataclasses import replace

import pytest

from guestfault.dialect.published import dialect_named
from guestfault.dialect.record import Guard
from guestfault.dialect.unmerged import KVM_RUN_MEMORY_FAULT_FILLED
from guestfault.fault.outcome import Hlt, Io, MemoryFault, Mmio, Shutdown
from guestfault.softkvm.page_track import kvm_slot_page_track_add_page
from guestfault.uapi import kvm as uapi
from guestfault.uapi.mman import PROT_NONE
from guestfault.x86.registers import X86_EFLAGS_IF

END = "e6f4"
DEVICE = 0x20_0000
HANDLER = 0x9000


def on_device(sregs):
    sregs.ss.base = DEVICE


@pytest.fixture
def restricted(soft):
    def start(code, **options):
        machine = soft(code, "real", **options)
        machine.vm.kvm.unrestricted_guest = False
        for vector in (0, 0x21):
            machine.gate(vector, HANDLER)
        machine.write(HANDLER, bytes.fromhex("f4 f4 f4"))
        return machine

    return start


@pytest.mark.parametrize(("code", "after"), [("f7f1", 0), ("cd21", 2)])
def test_the_handler_gets_its_frame(restricted, code, after):
    machine = restricted(code, rcx=0, rflags=2 | X86_EFLAGS_IF)
    assert machine.run() == Hlt()
    assert machine.regs.rip == HANDLER + 1
    assert not machine.regs.rflags & X86_EFLAGS_IF
    frame = machine.bytes[machine.regs.rsp :][:6]
    ip, cs, flags = struct.unpack("<HHH", frame)
    assert (ip, cs) == (machine.CODE + after, 0)
    assert flags & X86_EFLAGS_IF


def test_int_with_its_stack_on_a_device(start, is_soft):
    """Three pushes, of which the last comes out.  This host's KVM emulates INT n, too."""
    machine = start("cd21", "real", sregs=on_device, rsp=0x100)
    if is_soft:
        machine.vm.kvm.unrestricted_guest = False
    machine.gate(0x21, HANDLER)
    machine.write(HANDLER, bytes.fromhex(END))
    ip = struct.pack("<H", machine.CODE + 2)
    assert machine.run() == Mmio(DEVICE + 0xFA, ip, 2, True)
    assert (machine.regs.rip, machine.regs.rsp) == (HANDLER, 0xFA)
    assert machine.trace() == []


@pytest.mark.parametrize("where", ["device", "absent"])
def test_an_exception_with_no_stack_is_delivered_nevertheless(restricted, where):
    """Each push fails and is swallowed: the frame is nowhere, and no exit is made for it."""
    on = on_device if where == "device" else None
    machine = restricted("f7f1", sregs=on, rcx=0, rsp=0xF100)
    if on is None:
        machine.ram.guest.protect(machine.STACK, 4096, PROT_NONE)
    assert machine.run() == Hlt()
    run = machine.vcpu.kvm_run
    gpa = DEVICE + 0xF0FA if on else 0xF0FA
    assert (run.mmio.phys_addr, run.mmio.len, run.mmio.is_write) == (gpa, 2, 1)
    with pytest.warns(UserWarning, match="mmio_needed"):
        machine.run()


def test_the_exit_that_nobody_made_is_made_by_the_next_emulated_instruction(restricted):
    """mmio_needed is still set, and kvm_run is not filled anew."""
    machine = restricted("f7f1", sregs=on_device, rcx=0, rsp=0x100)
    machine.write(HANDLER, bytes.fromhex("880600a0 f4"))  # mov [0xa000], al
    kvm = machine.vm.kvm
    with kvm.second_stage.mmu_lock:
        kvm_slot_page_track_add_page(kvm, kvm.memslots.slots[0], 0xA)
    ip = struct.pack("<H", machine.CODE)
    assert machine.run() == Mmio(DEVICE + 0xFA, ip, 2, True)
    assert machine.run() == Hlt()


def test_the_processor_s_own_delivery_fails_where_kvm_s_does_not(soft):
    machine = soft("f7f1", "real", rcx=0, rsp=0xF100)
    machine.gate(0, HANDLER)
    machine.ram.guest.protect(machine.STACK, 4096, PROT_NONE)
    assert machine.run() == MemoryFault(machine.STACK, 4096, 1, 14)


def test_a_vector_that_cannot_be_read_is_a_triple_fault(restricted):
    """mmio_warning_test of the kernel's selftests ends so."""
    machine = restricted("f7f1", rcx=0)
    no_vectors(machine)
    assert machine.run() == Shutdown()
    assert not machine.vcpu.arch.emulate_ctxt.mmio_needed


def test_a_stack_that_is_at_its_end_is_a_triple_fault(restricted):
    machine = restricted("f7f1", rcx=0, rsp=1)
    assert machine.run() == Shutdown()


def no_vectors(machine):
    """The page at 0 is not to be had by a copy."""
    mm, page = machine.vm.kvm.mm, machine.ram.guest.address

    class NoVectors:
        def copy_from_user(self, hva, size):
            return None if hva & -4096 == page else mm.copy_from_user(hva, size)

        def __getattr__(self, name):
            return getattr(mm, name)

    machine.vm.kvm.mm = NoVectors()


# -- what the dialects that annotate KVM's own copies make of it -----------------------------------


def test_v5_s_canary_is_tripped_by_a_delivery_that_goes_well(restricted):
    """202309141107.30863e9d-oliver.sang@intel.com: the guest can make the kernel complain."""
    machine = restricted("f7f1", dialect="v5", sregs=on_device, rcx=0, rsp=0x100)
    with pytest.warns(UserWarning, match="filled already"):
        assert machine.run() == Hlt()
    run = machine.vcpu.kvm_run
    assert run.flags & KVM_RUN_MEMORY_FAULT_FILLED  # though KVM_RUN returned 0
    fault = run.speculative_exit.memory_fault
    assert (fault.flags, fault.gpa, fault.len) == (2, DEVICE + 0xFA, 2)


def test_v4_s_guard_is_tripped_by_its_own_exit(restricted):
    machine = restricted("f7f1", dialect="v4", sregs=on_device, rcx=0, rsp=0x100)
    with pytest.warns(UserWarning, match="has exit 6 prepared"):
        assert machine.run() == Hlt()


def test_a_prepared_exit_is_clobbered_where_nothing_guards_it(soft):
    """Case (A) of ZIn6VQSebTRN1jtX@google.com, in an INT n.

    The pushes prepare KVM_EXIT_MMIO; then the vector cannot be read, which is annotated and
    ignored; KVM_RUN returns 0 with an exit that nobody has asked for, on top of the other's bytes.
    """
    v4 = dialect_named("v4")
    machine = soft(
        "cd21",
        "real",
        dialect=replace(v4, guards=(Guard.LOADED_VCPU,)),
        sregs=on_device,
        rsp=0x100,
    )
    machine.vm.kvm.unrestricted_guest = False
    no_vectors(machine)
    assert machine.vcpu.run() == 0
    assert machine.vcpu.kvm_run.exit_reason == v4.interface.exit_reason
    assert machine.vcpu.kvm_run.memory_fault.gpa == 0x21 * 4 + 2


def test_v4_s_guard_saves_the_exit_and_loses_the_information(restricted):
    machine = restricted("cd21", dialect="v4", sregs=on_device, rsp=0x100)
    no_vectors(machine)
    with pytest.warns(UserWarning, match="has exit 6 prepared"):
        assert isinstance(machine.run(), Mmio)
    assert machine.vcpu.kvm_run.exit_reason == uapi.KVM_EXIT_MMIO


def test_external_interrupts_take_the_same_way(soft):
    """With the APIC in the kernel and nothing but real mode to deliver to."""
    machine = soft("fb 90 90 ebfc", "real", irqchip=True)
    machine.vm.kvm.unrestricted_guest = False
    machine.gate(0x21, HANDLER)
    machine.write(HANDLER, bytes.fromhex(END))
    machine.vcpu.arch.interrupt_injected = 0x21
    assert isinstance(machine.run(), Io)
    assert struct.unpack("<H", machine.bytes[machine.regs.rsp :][:2]) == (machine.CODE,)
