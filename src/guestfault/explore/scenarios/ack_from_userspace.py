"""A prefetching fault fails outside of KVM_RUN, while userspace answers an exit.

``kvm_check_async_pf_completion`` has a second caller: the write of MSR_KVM_ASYNC_PF_ACK, which
userspace may do as well, with KVM_SET_MSRS.  The vCPU is loaded then, and not in KVM_RUN: the last
exit is with userspace, and its answer stands in ``kvm_run`` for the next KVM_RUN to take.

As in :mod:`.async_ready` a handler reads a device while page A is waited for.  Userspace writes its
answer, then restores the MSR, then runs.
"""

from __future__ import annotations

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Scenario
from guestfault.explore.scenarios.async_world import apf_machine, asks_for_exits
from guestfault.explore.scenarios.layout import DEVICE, OLD, OLD_VALUE, A
from guestfault.explore.scheduler import choose
from guestfault.explore.scripted_cpu import iret, load, outb
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import CODE, END_PORT, HVA, Machine
from guestfault.fault.outcome import Mmio, Outcome
from guestfault.memory.ram import PAGE_SIZE
from guestfault.softkvm.irq import kvm_apic_set_irq
from guestfault.uapi.kvm_para import MSR_KVM_ASYNC_PF_ACK

__all__ = ["SCENARIO"]

_FAILURES = 5
_VECTOR = 0x20
_SVR_ENABLED = 0x1FF
_ANSWER = b"dev."
_SCRIPT = load("rax", A), outb(END_PORT)
_HANDLER = load("rbx", DEVICE), iret(CODE)


class _Vmm(Userspace):
    """Restores the MSR each time it has answered a device read."""

    def once(self) -> Outcome:
        """See :meth:`.Userspace.once`."""
        came_to = super().once()
        if isinstance(came_to, Mmio):
            self.vcpu.set_msrs({MSR_KVM_ASYNC_PF_ACK: 1})
        return came_to


def _build(dialect: Dialect) -> Machine:
    machine = apf_machine(dialect)
    machine.mm.pages[HVA + A].set(OLD)
    machine.mm.pages[HVA + A].may_fail = _FAILURES
    machine.slot(1, A, 2, HVA + A)
    vcpu = machine.vcpu(*_SCRIPT, registers={"rsp": 0xF00})
    assert vcpu.arch.apic is not None
    vcpu.arch.apic.svr = _SVR_ENABLED
    machine.handler(_VECTOR, *_HANDLER)
    machine.prefault()
    machine.prefault(0, 2)

    def bring_in(hva: int) -> None:
        machine.populate(hva)
        if machine.bitmap_hva:
            machine.set_userfault((hva - (HVA + A)) // PAGE_SIZE, False)

    def vmm() -> None:
        if choose("userspace asks for exits, or does not", 2) == 0:
            asks_for_exits(machine)
            bring_in(HVA + A)

    def interrupt() -> None:
        kvm_apic_set_irq(vcpu.arch, _VECTOR)

    machine.actors["vcpu0"] = _Vmm(machine, bring_in=bring_in, devices={DEVICE: _ANSWER})
    machine.actors["interrupt"] = interrupt
    machine.actors["vmm"] = vmm

    def check() -> None:
        machine.expect_registers(
            0,
            {"rax": OLD_VALUE, "rbx": int.from_bytes(_ANSWER, "little")},
            {"rax": OLD_VALUE, "rbx": 0},
        )

    machine.check = check
    return machine


SCENARIO = Scenario(
    name="ack-from-userspace",
    title="a prefetching fault fails while userspace answers an exit (KVM_SET_MSRS)",
    source="CAF7b7mof8HkcaSthEO8Wu9kf8ZHjE9c1TDzQGAYDYv7FN9+k9w@mail.gmail.com",
    build=_build,
)
