"""HLT and interrupts with a local APIC in the kernel: guests that send interrupts to themselves."""

import pytest

from guestfault.errors import KvmError
from guestfault.fault.outcome import Hlt, Interrupted, Io, Shutdown
from guestfault.softkvm.irq import kvm_apic_set_irq
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import PF_VECTOR, X86_EFLAGS_IF, X86_EFLAGS_TF

LONG0 = "long-cpl0"
IF = 2 | X86_EFLAGS_IF
END = "e6f4"
SEEN = 0xC000  # how many interrupts came, and from SEEN + 8 on which: (vector, where it came)
HANDLERS = {0x31: 0x9100, 0x51: 0x9200}
MSR_APIC_BASE, MSR_X2APIC_SVR = 0x1B, 0x80F


def send(vector):
    # mov ecx, 0x83f; xor edx, edx; mov eax, vector; wrmsr
    return f"b93f080000 31d2 b8{vector:02x}000000 0f30 "


def handler(vector):
    # mov r8, [SEEN]; inc qword [SEEN]; shl r8, 4; mov qword [r8 + SEEN + 8], vector
    # mov rax, [rsp]; mov [r8 + SEEN + 16], rax
    # mov ecx, 0x80b; xor eax, eax; xor edx, edx; wrmsr; iretq
    return bytes.fromhex(
        f"4c8b042500c00000 48ff042500c00000 49c1e004 49c78008c00000{vector:02x}000000"
        " 488b0424 49898010c00000 b90b080000 31c0 31d2 0f30 48cf"
    )


def seen(machine):
    count = machine.word(SEEN)
    at = [SEEN + 8 + 16 * i for i in range(count)]
    return [(machine.word(a), machine.word(a + 8) - machine.CODE) for a in at]


@pytest.fixture
def with_apic(start):
    """``with_apic(code, **regs)``: an APIC in x2APIC mode, switched on, and handlers."""

    def with_apic(code, **regs):
        machine = start(code, LONG0, irqchip=True, **regs)
        for vector, at in HANDLERS.items():
            machine.gate(vector, at)
            machine.write(at, handler(vector))
        base = machine.vcpu.get_msrs([MSR_APIC_BASE])[MSR_APIC_BASE]
        machine.vcpu.set_msrs({MSR_APIC_BASE: base | 0xC00})
        machine.vcpu.set_msrs({MSR_X2APIC_SVR: 0x1FF})
        return machine

    return with_apic


def seen_between_instructions(machine, is_soft):
    """What was seen, where it must have come between two instructions with interrupts on."""
    if not is_soft and not seen(machine):
        pytest.skip(
            "this host runs CPL0 in KVM's emulator, which looks for interrupts now and then"
        )
    return seen(machine)


def length(code):
    return len(bytes.fromhex(code))


@pytest.mark.timeout(20)
def test_the_more_urgent_first_and_each_when_the_other_is_done(with_apic, is_soft):
    machine = with_apic(send(0x31) + send(0x51) + "fb 90 90 fa" + END, rflags=2)
    assert isinstance(machine.run(), Io)
    came = seen_between_instructions(machine, is_soft)
    assert [vector for vector, _ in came] == [0x51, 0x31]


@pytest.mark.timeout(20)
@pytest.mark.parametrize("before", ["", "90", "fb fa"], ids=["at once", "nop", "sti; cli"])
def test_no_interrupt_comes_between_sti_and_hlt(with_apic, before):
    """Else a guest that looks for work and then halts would sleep through it."""
    code = send(0x31) + before + "fb f4"
    machine = with_apic(code + "fa" + END, rflags=2)
    assert isinstance(machine.run(), Io)
    assert seen(machine) == [(0x31, length(code))]


@pytest.mark.timeout(20)
def test_a_loop_of_one_instruction_after_sti_is_interrupted(with_apic, background):
    # sti; again: jmp again
    machine = with_apic(send(0x31) + "fb ebfe", rflags=2)
    run = background(machine.run)
    assert run.is_running()
    machine.vcpu.kick()
    assert isinstance(run.result(), Interrupted)
    assert seen(machine) == [(0x31, length(send(0x31)) + 1)]


@pytest.mark.timeout(20)
def test_it_comes_as_soon_as_the_guest_is_ready_and_leaves_no_trace(with_apic, is_soft):
    """While one waits, the guest is executed in single steps: PUSHF must not show that."""
    # pushfq; pop rbx; pushfw; pop si; push 0x202; popfq; inc r9; out
    code = send(0x31) + "9c 5b 669c 665e 6802020000 9d"
    machine = with_apic(code + "49ffc1" + END, rflags=2, rsi=0)
    assert isinstance(machine.run(), Io)
    assert seen_between_instructions(machine, is_soft) == [(0x31, length(code))]
    regs = machine.regs
    assert regs.rbx & X86_EFLAGS_TF == 0
    assert regs.rsi & X86_EFLAGS_TF == 0
    assert regs.rsp == machine.STACK
    assert regs.r9 == 1


@pytest.mark.timeout(20)
def test_the_task_priority_holds_it_back(with_apic, is_soft):
    # mov ecx, 0x808; xor edx, edx; mov eax, 0x30; wrmsr
    raise_tpr = "b908080000 31d2 b830000000 0f30 "
    lower_tpr = "b908080000 31d2 31c0 0f30 "
    code = raise_tpr + send(0x31) + send(0x51) + "fb 90 fa" + lower_tpr + "fb"
    machine = with_apic(code + "90 90 fa" + END, rflags=2)
    assert isinstance(machine.run(), Io)
    at = dict(seen_between_instructions(machine, is_soft))
    assert at[0x51] < length(code) <= at[0x31]


@pytest.mark.timeout(20)
def test_a_kick_ends_a_halt_and_leaves_it_one(with_apic, background):
    machine = with_apic("fb f4" + END, rflags=2)
    for _ in range(2):
        run = background(machine.run)
        assert run.is_running()
        machine.vcpu.kick()
        assert isinstance(run.result(), Interrupted)
        assert machine.vcpu.get_mp_state() == uapi.KVM_MP_STATE_HALTED
    machine.vcpu.set_mp_state(uapi.KVM_MP_STATE_RUNNABLE)
    assert isinstance(machine.run(), Io)


@pytest.mark.timeout(20)
def test_without_an_apic_hlt_is_userspace_s(start):
    machine = start("f4" + END, LONG0)
    assert isinstance(machine.run(), Hlt)
    assert isinstance(machine.run(), Io)


@pytest.mark.timeout(20)
def test_another_thread_s_interrupt_ends_a_halt(soft, background):
    machine = soft("fb f4 fa" + END, LONG0, irqchip=True, rflags=2)
    vcpu = machine.vcpu.arch
    machine.gate(0x31, HANDLERS[0x31])
    machine.write(HANDLERS[0x31], handler(0x31))
    machine.vcpu.set_msrs({MSR_APIC_BASE: 0xFEE00D00, MSR_X2APIC_SVR: 0x1FF})
    run = background(machine.run)
    assert run.is_running()
    assert vcpu.mp_state == uapi.KVM_MP_STATE_HALTED
    assert kvm_apic_set_irq(vcpu, 0x31)
    assert isinstance(run.result(), Io)
    assert seen(machine) == [(0x31, 2)]


@pytest.mark.timeout(20)
def test_an_interrupt_whose_stack_is_absent_is_delivered_later(soft):
    """It is taken from the APIC, cannot be delivered, and is not lost with the -EFAULT."""
    machine = soft("fb 90 90 fa" + END, LONG0, irqchip=True, rflags=2, rsp=0xF000)
    machine.gate(0x31, HANDLERS[0x31])
    machine.write(HANDLERS[0x31], handler(0x31))
    machine.vcpu.set_msrs({MSR_APIC_BASE: 0xFEE00D00, MSR_X2APIC_SVR: 0x1FF, 0x83F: 0x31})
    ram = machine.ram.guest
    ram.protect(0xE000, 4096, 0)
    assert machine.vcpu.run() == -14
    sregs = machine.vcpu.get_sregs()
    assert sregs.interrupt_bitmap[0] == 1 << 0x31
    machine.vcpu.set_sregs(sregs)
    ram.protect(0xE000, 4096, 3)
    assert isinstance(machine.run(), Io)
    assert [vector for vector, _ in seen(machine)] == [0x31]


@pytest.mark.timeout(20)
def test_a_fault_on_the_way_comes_first_and_the_interrupt_after_it(soft):
    """The stack's page table entry is not there at first: #PF on another stack, then the rest."""
    machine = soft("fb 90 90 fa" + END, LONG0, irqchip=True, rflags=2, rsp=0x8_0000)
    machine.gate(0x31, HANDLERS[0x31])
    machine.write(HANDLERS[0x31], handler(0x31))
    machine.change_entry(0x7_F000)
    at = machine.entry_at(0x7_F000)
    machine.gate(PF_VECTOR, 0x9300, ist=1)
    # or byte [entry], 1; add rsp, 8; iretq
    machine.write(0x9300, bytes.fromhex(f"800c25{at.to_bytes(4, 'little').hex()}01 4883c408 48cf"))
    machine.vcpu.set_msrs({MSR_APIC_BASE: 0xFEE00D00, MSR_X2APIC_SVR: 0x1FF, 0x83F: 0x31})
    assert isinstance(machine.run(), Io)
    assert [vector for vector, _ in seen(machine)] == [0x31]


# -- application processors ------------------------------------------------------------------------


@pytest.mark.timeout(20)
def test_an_application_processor_waits_until_it_is_made_runnable(start, background):
    machine = start(END, LONG0, irqchip=True)
    second = machine.add_vcpu(1)
    assert machine.vcpu.get_mp_state() == uapi.KVM_MP_STATE_RUNNABLE
    assert second.get_mp_state() == uapi.KVM_MP_STATE_UNINITIALIZED
    run = background(machine.run, second)
    assert run.is_running()
    second.kick()
    assert isinstance(run.result(), Interrupted)
    second.set_mp_state(uapi.KVM_MP_STATE_RUNNABLE)
    assert isinstance(machine.run(second), Io)


def test_without_an_apic_there_is_one_state(start):
    machine = start(END, LONG0)
    machine.vcpu.set_mp_state(uapi.KVM_MP_STATE_RUNNABLE)
    with pytest.raises(KvmError, match="MP_STATE"):
        machine.vcpu.set_mp_state(uapi.KVM_MP_STATE_HALTED)


@pytest.mark.parametrize("cap", ["IRQCHIP", "HLT", "MP_STATE", "ASYNC_PF", "ASYNC_PF_INT"])
def test_what_there_is_is_announced(start, cap):
    machine = start(END, LONG0)
    assert machine.vm.check_extension(getattr(uapi, f"KVM_CAP_{cap}")) == 1


def test_when_an_irqchip_can_be_made(start):
    machine = start(END, LONG0)
    with pytest.raises(KvmError, match="EINVAL"):
        machine.vm.create_irqchip()
    machine = start(END, LONG0, irqchip=True)
    with pytest.raises(KvmError, match="EEXIST"):
        machine.vm.create_irqchip()


@pytest.mark.timeout(20)
def test_a_triple_fault_is_a_shutdown(start):
    machine = start("0f0b", LONG0, irqchip=True, sregs=lambda s: setattr(s.idt, "limit", 0))
    assert isinstance(machine.run(), Shutdown)
