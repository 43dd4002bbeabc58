"""Asynchronous page faults from end to end: a guest, a userfaultfd on its RAM, a worker.

The guests run in long mode at CPL0 with interrupts on.  What they see is the same on ``/dev/kvm``,
where it can be had; there the tests differ in nothing but that they cannot look inside.
"""

import select
import threading
import time

import pytest

from guestfault.errors import KvmError, Unavailable
from guestfault.fault.outcome import Interrupted, Io, MemoryFault
from guestfault.memory.ram import PAGE_SIZE
from guestfault.memory.view import Registered
from guestfault.softkvm.async_pf import ASYNC_PF_PER_VCPU
from guestfault.uapi import kvm as uapi
from guestfault.uapi.kvm_para import (
    KVM_ASYNC_PF_DELIVERY_AS_INT,
    KVM_ASYNC_PF_ENABLED,
    KVM_ASYNC_PF_SEND_ALWAYS,
    KVM_PV_REASON_PAGE_NOT_PRESENT,
    MSR_KVM_ASYNC_PF_ACK,
    MSR_KVM_ASYNC_PF_EN,
    MSR_KVM_ASYNC_PF_INT,
)
from guestfault.x86.registers import PF_VECTOR, X86_EFLAGS_IF, X86_EFLAGS_IOPL

LONG0, LONG3 = "long-cpl0", "long-cpl3"
DATA = 0x4_0000
IF = 2 | X86_EFLAGS_IF
USER_IF = IF | X86_EFLAGS_IOPL  # which may use ports
READ = "488b07 e6f4"  # mov rax, [rdi]; out 0xf4, al
WRITE = "488937 e6f4"  # mov [rdi], rsi; out 0xf4, al

PF_HANDLER, IRQ_HANDLER = 0x9000, 0xA000
APF_DATA = 0xB000  # struct kvm_vcpu_pv_apf_data
LAST, COUNT = 0xC000, 0xC008  # the token that the interrupt brought last; how many there were
VECTOR = 0xF0
MSR_APIC_BASE, MSR_X2APIC_SVR = 0x1B, 0x80F
WAKEUP_ALL = 0xFFFFFFFF

# Takes the token, empties the slot, says so to KVM, ends the interrupt:
# push rax; push rcx; push rdx; mov eax, [APF_DATA + 4]; mov [LAST], eax; inc dword [COUNT]
# mov dword [APF_DATA + 4], 0; mov ecx, MSR_KVM_ASYNC_PF_ACK; mov eax, 1; xor edx, edx; wrmsr
# mov ecx, 0x80b; xor eax, eax; wrmsr; pop rdx; pop rcx; pop rax; iretq
ON_READY = (
    "50 51 52 8b042504b00000 89042500c00000 ff042508c00000"
    " c7042504b0000000000000 b9074d564b b801000000 31d2 0f30"
    " b90b080000 31c0 0f30 5a 59 58 48cf"
)
# Only counts and ends the interrupt:
# push rax; push rcx; push rdx; inc dword [COUNT]
# mov ecx, 0x80b; xor eax, eax; xor edx, edx; wrmsr; pop rdx; pop rcx; pop rax; iretq
COUNTS_ONLY = "50 51 52 ff042508c00000 b90b080000 31c0 31d2 0f30 5a 59 58 48cf"

# add rsp, 8; mov rbx, cr2; mov r12d, [APF_DATA]; mov dword [APF_DATA], 0
_TAKE = "4883c408 0f20d3 448b242500b00000 c7042500b0000000000000"
# again: cmp [LAST], ebx; je done; sti; hlt; cli; jmp again; done: iretq
HALTS = _TAKE + "391c2500c00000 7405 fb f4 fa ebf2 48cf"
# sti; again: inc r15; cmp [LAST], ebx; jne again; iretq
SPINS = _TAKE + "fb 49ffc7 391c2500c00000 75f4 48cf"
# Goes on behind the access: add rsp, 8; mov dword [APF_DATA], 0; add qword [rsp], 3; iretq
SKIPS = "4883c408 c7042500b0000000000000 4883042403 48cf"


class Absent:
    """A machine's RAM under userfaultfd: all of it is in but ``pages``."""

    def __init__(self, machine, pages):
        self.machine = machine
        try:
            self.view = Registered(machine.ram, sigbus=False)
        except Unavailable as why:
            pytest.skip(f"needs userfaultfd: {why}")
        machine.ram.host.populate_write(0, machine.RAM_SIZE)
        at = 0
        for page in [*pages, machine.RAM_SIZE]:
            if page > at:
                self.view.bring_in(at, page - at)
            at = page + PAGE_SIZE
        self.asked = []

    def fault(self):
        """Wait for a page to be asked for, and give its guest physical address."""
        poll = select.poll()
        poll.register(self.view.uffd.fileno(), select.POLLIN)
        while not self.asked:
            assert poll.poll(10_000), "nobody asked for a page"
            self.asked += self.view.uffd.read_events()
        return self.asked.pop(0).address - self.machine.ram.guest.address

    def bring_in(self, gpa):
        self.view.bring_in(gpa & -PAGE_SIZE, PAGE_SIZE)


@pytest.fixture
def absent():
    """``absent(machine, *pages)``: userfaultfd on its RAM."""
    made = []

    def absent(machine, *pages):
        made.append(Absent(machine, pages or (DATA,)))
        return made[-1]

    yield absent
    for one in made:
        one.view.shut()
        one.view.close()


def enable(machine, *, handler=HALTS, ready=ON_READY, flags=KVM_ASYNC_PF_SEND_ALWAYS):
    """Have the guest take asynchronous page faults: handlers, APIC and MSRs."""
    machine.gate(PF_VECTOR, PF_HANDLER)
    machine.gate(VECTOR, IRQ_HANDLER)
    machine.write(PF_HANDLER, bytes.fromhex(handler))
    machine.write(IRQ_HANDLER, bytes.fromhex(ready))
    on = KVM_ASYNC_PF_ENABLED | KVM_ASYNC_PF_DELIVERY_AS_INT | flags
    try:
        base = machine.vcpu.get_msrs([MSR_APIC_BASE])[MSR_APIC_BASE]
        machine.vcpu.set_msrs({MSR_APIC_BASE: base | 0xC00})
        machine.vcpu.set_msrs({MSR_X2APIC_SVR: 0x1FF})
        machine.vcpu.set_msrs({MSR_KVM_ASYNC_PF_INT: VECTOR, MSR_KVM_ASYNC_PF_EN: APF_DATA | on})
    except KvmError as refused:
        pytest.skip(f"this KVM has no asynchronous page faults for guests: {refused}")


def is_idle(machine):
    """Nothing of an asynchronous page fault is left."""
    vcpu = machine.vcpu.arch
    apf = vcpu.async_pf
    return not (apf.queued or apf.queue or apf.done or vcpu.apf.gfns or vcpu.apf.halted)


# -- without the guest's knowledge -----------------------------------------------------------------


@pytest.mark.timeout(30)
@pytest.mark.parametrize("code", [READ, WRITE])
def test_a_halted_vcpu_goes_on_when_its_page_has_come(start, absent, background, is_soft, code):
    machine = start(code, LONG0, irqchip=True, rflags=IF, rdi=DATA + 8, rsi=41)
    machine.write(DATA + 8, (12345).to_bytes(8, "little"))
    memory = absent(machine)
    run = background(machine.run)
    assert memory.fault() == DATA
    assert run.is_running()
    if is_soft:
        assert machine.vcpu.arch.apf.halted
        assert machine.vcpu.arch.apf.gfns == {DATA >> 12}
    memory.bring_in(DATA)
    assert isinstance(run.result(), Io)
    if code == READ:
        assert machine.regs.rax == 12345
    else:
        assert machine.word(DATA + 8) == 41
    if is_soft:
        assert is_idle(machine)


@pytest.mark.timeout(30)
@pytest.mark.parametrize(
    ("irqchip", "rflags"), [(False, IF), (True, 2)], ids=["no APIC", "interrupts off"]
)
def test_a_vcpu_that_could_not_be_halted_waits_itself(soft, absent, background, irqchip, rflags):
    machine = soft(READ, LONG0, irqchip=irqchip, rflags=rflags, rdi=DATA)
    memory = absent(machine)
    run = background(machine.run)
    assert memory.fault() == DATA
    assert run.is_running()
    assert is_idle(machine)
    memory.bring_in(DATA)
    assert isinstance(run.result(), Io)


@pytest.mark.timeout(30)
def test_a_page_that_never_comes_can_be_left_by_a_kick(start, absent, background):
    """A halt for a page is interruptible, and is still there afterwards."""
    machine = start(READ, LONG3, irqchip=True, rflags=USER_IF, rdi=DATA)
    memory = absent(machine)
    for first in (True, False):
        run = background(machine.run)
        if first:
            memory.fault()
        assert run.is_running()
        machine.vcpu.kick()
        assert isinstance(run.result(), Interrupted)
    memory.bring_in(DATA)
    assert isinstance(machine.run(), Io)


@pytest.mark.timeout(30)
def test_a_page_that_fails_is_the_guest_s_own_fault_the_second_time(soft, absent, background):
    """The worker drops its failure, kvm_arch_async_page_ready the next; the guest's own is told."""
    machine = soft(READ, LONG0, irqchip=True, rflags=IF, rdi=DATA)
    memory = absent(machine)
    run = background(machine.run)
    memory.fault()
    memory.view.shut(DATA, PAGE_SIZE)
    fault = run.result()
    assert isinstance(fault, MemoryFault)
    assert (fault.gpa, fault.size) == (DATA, PAGE_SIZE)
    assert is_idle(machine)
    assert machine.vcpu.arch.apf.id == 2  # one token was given out, from 1 on


@pytest.mark.timeout(30)
@pytest.mark.parametrize("comes", [True, False], ids=["the page comes later", "it never comes"])
def test_a_vm_can_be_closed_while_a_worker_sleeps(soft, absent, background, until, comes):
    """Closing waits for no page; the worker that sleeps ends with its page or its range."""
    machine = soft(READ, LONG0, irqchip=True, rflags=IF, rdi=DATA)
    memory = absent(machine)
    run = background(machine.run)
    memory.fault()
    began = time.monotonic()
    machine.vm.close()
    assert time.monotonic() - began < 5
    assert run.result().__class__ is Interrupted
    if comes:
        memory.bring_in(DATA)
    else:
        memory.view.shut()

    def no_workers():
        return not any(t.name == "softkvm-worker" for t in threading.enumerate())

    until(no_workers)


@pytest.mark.timeout(30)
def test_under_shadow_paging(soft, absent, background):
    """The fault that is made again has a linear address, and is of the same page tables."""
    machine = soft(READ, LONG0, tdp_enabled=False, irqchip=True, rflags=IF, rdi=DATA)
    machine.write(DATA, (12345).to_bytes(8, "little"))
    memory = absent(machine)
    run = background(machine.run)
    assert memory.fault() == DATA
    assert run.is_running()
    assert machine.vcpu.arch.apf.halted
    assert not machine.vcpu.arch.async_pf.queue[0].arch.direct_map
    memory.bring_in(DATA)
    assert isinstance(run.result(), Io)
    assert machine.regs.rax == 12345
    assert is_idle(machine)


# -- with it ---------------------------------------------------------------------------------------


def told_twice(machine, memory, run):
    assert memory.fault() == DATA
    assert run.is_running()
    memory.bring_in(DATA)
    assert isinstance(run.result(), Io)
    regs = machine.regs
    assert regs.rax == 777
    assert regs.r12 == KVM_PV_REASON_PAGE_NOT_PRESENT
    assert regs.rbx == machine.word(LAST, 4) != 0
    assert regs.rbx & 0xFFF == machine.vcpu.vcpu_id
    assert machine.word(COUNT, 4) == 2  # the first tells everybody to wake, as delivery was enabled


@pytest.mark.timeout(30)
@pytest.mark.parametrize("handler", [HALTS, SPINS], ids=["halts", "spins"])
def test_a_user_s_fault_is_told_twice(start, absent, background, handler):
    """A #PF with a token says "page not present", an interrupt with the same "page ready"."""
    machine = start(READ, LONG3, irqchip=True, rflags=USER_IF, rdi=DATA)
    machine.write(DATA, (777).to_bytes(8, "little"))
    enable(machine, handler=handler, flags=0)
    memory = absent(machine)
    told_twice(machine, memory, background(machine.run))


@pytest.mark.timeout(30)
@pytest.mark.parametrize("handler", [HALTS, SPINS], ids=["halts", "spins"])
def test_a_supervisor_s_too_if_the_guest_asks_for_always(soft, absent, background, handler):
    machine = soft(READ, LONG0, irqchip=True, rflags=IF, rdi=DATA)
    machine.write(DATA, (777).to_bytes(8, "little"))
    enable(machine, handler=handler)
    memory = absent(machine)
    told_twice(machine, memory, background(machine.run))
    assert is_idle(machine)
    assert (machine.regs.r15 > 0) is (handler == SPINS)


@pytest.mark.timeout(30)
def test_else_a_supervisor_s_halts_the_vcpu(soft, absent, background):
    machine = soft(READ, LONG0, irqchip=True, rflags=IF, rdi=DATA)
    enable(machine, flags=0)
    memory = absent(machine)
    run = background(machine.run)
    memory.fault()
    assert run.is_running()
    assert machine.vcpu.arch.apf.halted
    memory.bring_in(DATA)
    assert isinstance(run.result(), Io)
    assert machine.regs.rbx == 0  # no #PF came
    assert machine.word(LAST, 4) == WAKEUP_ALL
    assert machine.word(COUNT, 4) == 1


@pytest.mark.timeout(60)
def test_the_sixty_fifth_is_waited_for(soft, absent, background, until):
    """ASYNC_PF_PER_VCPU under way: the next page is waited for by the vCPU itself."""
    pages = [DATA + i * PAGE_SIZE for i in range(ASYNC_PF_PER_VCPU + 1)]
    # again: mov rax, [rdi]; add rdi, 4096; dec rcx; jnz again
    # wait: cmp [COUNT], rsi; jb wait; out 0xf4, al
    code = "488b07 4881c700100000 48ffc9 75f1 4839342508c00000 72f6 e6f4"
    told = ASYNC_PF_PER_VCPU + 1  # and the one that tells everybody
    machine = soft(
        code, LONG0, irqchip=True, rflags=IF, rdi=DATA, rcx=ASYNC_PF_PER_VCPU + 1, rsi=told
    )
    enable(machine, handler=SKIPS)
    memory = absent(machine, *pages)
    run = background(machine.run)
    vcpu = machine.vcpu.arch
    until(lambda: vcpu.async_pf.queued == ASYNC_PF_PER_VCPU)
    asked = {memory.fault() for _ in pages}
    assert asked == set(pages)
    assert run.is_running()
    assert vcpu.async_pf.queued == ASYNC_PF_PER_VCPU
    assert pages[-1] >> 12 not in vcpu.apf.gfns
    assert vcpu.in_guest_mode is False
    for page in pages:
        memory.bring_in(page)
    assert isinstance(run.result(30), Io)
    assert machine.word(COUNT, 4) == told
    assert is_idle(machine)


@pytest.fixture
def done_and_untold(soft, absent, background, until):
    """A page whose worker is done, and that the guest cannot be told of before it acknowledges.

    ``done_and_untold(resolve)`` gives the machine, which is not in KVM_RUN; the slot is free.
    """

    def make(resolve):
        machine = soft("488b07 ebfe", LONG0, irqchip=True, rflags=IF, rdi=DATA)
        enable(machine, handler=SKIPS, ready=COUNTS_ONLY)
        memory = absent(machine)
        run = background(machine.run)
        memory.fault()
        assert run.is_running()
        machine.vcpu.kick()
        assert isinstance(run.result(), Interrupted)
        assert machine.word(COUNT, 4) == 1  # it was told to wake everybody, and left it at that
        resolve(memory)
        until(lambda: len(machine.vcpu.arch.async_pf.done) == 1)
        machine.vcpu.set_msrs({MSR_KVM_ASYNC_PF_ACK: 1})
        assert len(machine.vcpu.arch.async_pf.done) == 1, "the slot holds the other token"
        machine.write(APF_DATA + 4, bytes(4))
        return machine

    return make


@pytest.mark.timeout(30)
def test_the_next_is_told_when_userspace_acknowledges(done_and_untold):
    """KVM_SET_MSRS makes the page fault with the vCPU loaded, and nobody in KVM_RUN."""
    machine = done_and_untold(lambda memory: memory.bring_in(DATA))
    sptes = machine.vcpu.arch.kvm.second_stage.sptes
    assert DATA >> 12 not in sptes
    machine.vcpu.set_msrs({MSR_KVM_ASYNC_PF_ACK: 1})
    assert DATA >> 12 in sptes
    assert machine.word(APF_DATA + 4, 4) == 1 << 12
    assert is_idle(machine)


@pytest.mark.timeout(30)
def test_a_suppressed_annotation_reaches_kvm_run_outside_of_it(done_and_untold):
    """The guard "the vCPU is loaded" holds in KVM_SET_MSRS; "somebody is in KVM_RUN" does not."""
    machine = done_and_untold(lambda memory: memory.view.shut(DATA, PAGE_SIZE))
    run = machine.vcpu.kvm_run
    run.exit_reason = uapi.KVM_EXIT_UNKNOWN
    machine.vcpu.set_msrs({MSR_KVM_ASYNC_PF_ACK: 1})
    assert run.exit_reason == machine.interface.exit_reason
    assert run.memory_fault.gpa == DATA


# -- the MSRs --------------------------------------------------------------------------------------


def test_the_msrs_can_be_read_back(soft):
    machine = soft(READ, LONG0, irqchip=True)
    enable(machine)
    indices = [MSR_KVM_ASYNC_PF_EN, MSR_KVM_ASYNC_PF_INT, MSR_KVM_ASYNC_PF_ACK]
    assert list(machine.vcpu.get_msrs(indices).values()) == [APF_DATA | 0b1011, VECTOR, 0]


@pytest.mark.parametrize(
    ("index", "value"),
    [
        (MSR_KVM_ASYNC_PF_EN, APF_DATA | 0x10 | 0b1001),  # a reserved bit
        (MSR_KVM_ASYNC_PF_EN, 0x4000_0000 | 0b1001),  # no slot
        (MSR_KVM_ASYNC_PF_INT, 0x100),
    ],
)
def test_what_the_msrs_do_not_take(start, index, value):
    machine = start(READ, LONG0, irqchip=True)
    with pytest.raises(KvmError, match=f"{index:#x}"):
        machine.vcpu.set_msrs({index: value})


def test_without_an_apic_they_cannot_be_enabled(start):
    machine = start(READ, LONG0)
    with pytest.raises(KvmError):
        machine.vcpu.set_msrs({MSR_KVM_ASYNC_PF_EN: APF_DATA | 0b1001})


@pytest.mark.timeout(30)
def test_switching_it_off_forgets_what_is_under_way(soft, absent, background):
    machine = soft(READ, LONG0, irqchip=True, rflags=IF, rdi=DATA)
    memory = absent(machine)
    run = background(machine.run)
    memory.fault()
    machine.vcpu.kick()
    assert isinstance(run.result(), Interrupted)
    assert machine.vcpu.arch.async_pf.queued == 1
    machine.vcpu.set_msrs({MSR_KVM_ASYNC_PF_EN: 0})
    apf = machine.vcpu.arch.async_pf
    assert (apf.queued, apf.queue, machine.vcpu.arch.apf.gfns) == (0, [], set())
    memory.bring_in(DATA)
    time.sleep(0.05)
    assert not apf.done  # the worker found that nobody wants to hear of it
