"""The seed's own case: a prefetching fault fails while another exit is prepared.

The vCPU is halted for page A.  An interrupt ends the halt, and its handler accesses a device: an
exit is prepared.  The worker has done meanwhile, without success, and
``kvm_arch_async_page_ready`` faults A in: before the exit, after it, or while userspace answers it.
Userspace lets A in at some time, and the guest comes to its end.
"""

from __future__ import annotations

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Scenario
from guestfault.explore.scenarios.async_world import apf_machine
from guestfault.explore.scenarios.layout import DEVICE, OLD, OLD_VALUE, A
from guestfault.explore.scripted_cpu import iret, load, outb
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import CODE, END_PORT, HVA, Machine
from guestfault.softkvm.irq import kvm_apic_set_irq

__all__ = ["SCENARIO"]

_FAILURES = 5
_VECTOR = 0x20
_SVR_ENABLED = 0x1FF
_ANSWER = b"dev."
_SCRIPT = load("rax", A), outb(END_PORT)
_HANDLER = load("rbx", DEVICE), iret(CODE)


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

    def interrupt() -> None:
        kvm_apic_set_irq(vcpu.arch, _VECTOR)

    machine.actors["vcpu0"] = Userspace(machine, bring_in=bring_in, devices={DEVICE: _ANSWER})
    machine.actors["interrupt"] = interrupt

    def check() -> None:
        # The interrupt may come after the end, or while there is no APIC that takes it.
        machine.expect_registers(
            0,
            {"rax": OLD_VALUE, "rbx": int.from_bytes(_ANSWER, "little")},
            {"rax": OLD_VALUE, "rbx": 0},
        )

    machine.check = check
    return machine


SCENARIO = Scenario(
    name="async-ready",
    title="a prefetching fault fails while another exit is prepared",
    source="CAF7b7mof8HkcaSthEO8Wu9kf8ZHjE9c1TDzQGAYDYv7FN9+k9w@mail.gmail.com",
    build=_build,
)
