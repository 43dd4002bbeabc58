"""Two vCPUs meet the same absent page, and the thread of each lets it in.

One of them comes second: its ``UFFDIO_CONTINUE`` fails with EEXIST, and that is no error.
"""

from __future__ import annotations

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Scenario
from guestfault.explore.scenarios.layout import OLD, OLD_VALUE, PAGES, A
from guestfault.explore.scripted_cpu import load, outb
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import END_PORT, HVA, Machine

__all__ = ["SCENARIO"]

_SCRIPT = load("rax", A), outb(END_PORT)


def _build(dialect: Dialect) -> Machine:
    machine = Machine(dialect, PAGES)
    machine.slot(0, 0, 2, HVA)
    machine.mm.pages[HVA + A].set(OLD)
    bring_in = machine.postcopy(1, A, 1)
    for number in range(2):
        machine.vcpu(*_SCRIPT)
        machine.actors[f"vcpu{number}"] = Userspace(machine, number, bring_in=bring_in)
    machine.prefault()

    def check() -> None:
        for number in range(2):
            machine.expect_registers(number, {"rax": OLD_VALUE})

    machine.check = check
    return machine


SCENARIO = Scenario(
    name="two-resolvers",
    title="the threads of two vCPUs let the same page in",
    source="20230412213510.1220557-1-amoorthy@google.com",
    build=_build,
)
