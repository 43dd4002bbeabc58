"""An event is delivered in real mode to a stack that is lost, and the handler meets an absent page.

On a processor that cannot do it (VMX without unrestricted guest) KVM delivers an event in real mode
itself, by three pushes.  One that fails is taken for a write to a device, and since no instruction
is under way the exit for it is never made: the guest goes on in its handler.  What the handler then
meets is a fault like any other.
"""

from __future__ import annotations

import errno

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Scenario
from guestfault.explore.scenarios.layout import OLD, OLD_VALUE, PAGES, A, B
from guestfault.explore.scripted_cpu import load, outb, ud2
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import END_PORT, HVA, Machine
from guestfault.x86.registers import UD_VECTOR

__all__ = ["SCENARIO"]


def _build(dialect: Dialect) -> Machine:
    machine = Machine(dialect, PAGES + 1)
    machine.kvm.unrestricted_guest = False
    machine.slot(0, 0, 2, HVA)
    machine.mm.pages[HVA + A].set(OLD)
    bring_in = machine.postcopy(1, A, 1)
    machine.mm.pages[HVA + B].error = errno.EFAULT
    machine.slot(2, B, 1, HVA + B)
    machine.vcpu(ud2(), registers={"rsp": B + 0x800})
    machine.handler(UD_VECTOR, load("rax", A), outb(END_PORT))
    machine.prefault()
    machine.actors["vcpu0"] = Userspace(machine, bring_in=bring_in)
    machine.check = lambda: machine.expect_registers(0, {"rax": OLD_VALUE})
    return machine


SCENARIO = Scenario(
    name="realmode-event",
    title="an event in real mode, whose frame is lost, then a fault",
    source="202309141107.30863e9d-oliver.sang@intel.com",
    build=_build,
)
