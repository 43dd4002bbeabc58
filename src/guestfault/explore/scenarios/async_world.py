"""A machine with asynchronous page faults: what several scenarios have in common.

vCPU 0 has a local APIC in the kernel, and its interrupts are on: a page that must be waited for is
waited for by a worker, while the vCPU is halted.
"""

from __future__ import annotations

from guestfault.dialect.record import Dialect
from guestfault.explore.scenarios.layout import PAGES, A
from guestfault.explore.world import HVA, Machine

__all__ = ["apf_machine", "asks_for_exits"]

_DATA_PAGES = 2


def apf_machine(dialect: Dialect) -> Machine:
    """Slot 0 is the code's; slot 1, with A and B, and the vCPU are the caller's to make."""
    machine = Machine(dialect, PAGES + 1)
    machine.vm.create_irqchip()
    machine.slot(0, 0, 2, HVA)
    return machine


def asks_for_exits(machine: Machine) -> None:
    """Post-copy begins: from now on a fault in slot 1 is to be an exit, if there is a way to ask.

    Nothing of the slot's memory changes by that.
    """
    flags = machine.ask_for_exits(_DATA_PAGES)
    if flags:
        machine.slot(1, A, _DATA_PAGES, HVA + A, flags)
