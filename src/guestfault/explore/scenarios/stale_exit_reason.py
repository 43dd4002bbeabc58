"""A fault is reported and resolved, and a later one comes back bare.

Post-copy is over: userspace has resolved the last fault, asks for no more exits, and a signal ends
a KVM_RUN in between.  Then a page is lost for good, and KVM_RUN fails in a way that not every
version annotates.  ``exit_reason`` still says what it said, unless something has reset it.
"""

from __future__ import annotations

import errno

from guestfault.dialect.record import Ask, Dialect
from guestfault.explore.scenario import Scenario
from guestfault.explore.scenarios.layout import OLD, PAGES, A, B
from guestfault.explore.scripted_cpu import load, outb
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import END_PORT, HVA, Machine
from guestfault.fault.outcome import BareFault, MemoryFault, Outcome

__all__ = ["SCENARIO"]

_SCRIPT = load("rax", A), load("rbx", B), outb(END_PORT)


class _Vmm(Userspace):
    """Asks for no more exits once it has resolved one."""

    def once(self) -> Outcome:
        """See :meth:`.Userspace.once`."""
        came_to = super().once()
        if isinstance(came_to, MemoryFault | BareFault) and len(self.seen) == 1:
            machine = self.machine
            missing = machine.dialect.missing
            if missing is not None and missing.ask is Ask.VM_SWITCH:
                machine.vm.set_mem_fault_nowait(False)
            else:
                machine.slot(1, A, 2, HVA + A)
        return came_to


def _build(dialect: Dialect) -> Machine:
    machine = Machine(dialect, PAGES + 1)
    machine.slot(0, 0, 2, HVA)
    machine.mm.pages[HVA + A].set(OLD)
    bring_in = machine.postcopy(1, A, 2)
    machine.vcpu(*_SCRIPT)
    machine.prefault()
    vcpu = _Vmm(machine, bring_in=bring_in)
    machine.mm.pages[HVA + B].error = errno.EFAULT

    machine.actors["vcpu0"] = vcpu
    machine.actors["signal"] = machine.vcpus[0].kick
    return machine


SCENARIO = Scenario(
    name="stale-exit-reason",
    title="a fault is resolved, and a later KVM_RUN fails bare",
    source="ZBiBkwIF4YHnphPp@google.com",
    build=_build,
)
