"""The fault path is entered for a vCPU by a thread that has not loaded it.

The thread's own worry: somebody uses a vCPU that is not his to access guest memory, fails, and
annotates a run page that belongs to another thread at that moment.  No path of the kernel does so;
the guard is there in case one comes.  Here one does: a page is faulted in ahead for vCPU 0, by a
thread that has loaded no vCPU, or another one.
"""

from __future__ import annotations

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Scenario
from guestfault.explore.scenarios.layout import DEVICE, OLD, OLD_VALUE, PAGES, A, B
from guestfault.explore.scripted_cpu import load, outb, store
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import END_PORT, HVA, Machine, reports_guest_faults
from guestfault.softkvm.kvm_host import vcpu_load, vcpu_put
from guestfault.softkvm.mmu import kvm_mmu_do_page_fault

__all__ = ["ANOTHER_LOADED", "NOT_LOADED"]

_WRITE = b"ctrl"
_SCRIPT = store(DEVICE, _WRITE), load("rax", A), outb(END_PORT)


def _build(dialect: Dialect, other: bool) -> Machine:
    machine = Machine(dialect, PAGES + 1)
    machine.slot(0, 0, 2, HVA)
    machine.mm.pages[HVA + A].set(OLD)
    bring_in = machine.postcopy(1, A, 2)
    machine.vcpu(*_SCRIPT)
    if other:
        machine.vcpu(outb(END_PORT))
    machine.prefault()
    vcpu = Userspace(machine, bring_in=bring_in, expected_writes=((DEVICE, _WRITE),))

    def intruder() -> None:
        if other:
            vcpu_load(machine.vcpus[1].arch)
        kvm_mmu_do_page_fault(machine.vcpus[0].arch, B, 0, prefetch=True)
        if other:
            vcpu_put()

    machine.actors["vcpu0"] = vcpu
    machine.actors["intruder"] = intruder
    machine.check = lambda: machine.expect_registers(0, {"rax": OLD_VALUE})
    return machine


_SOURCE = "CAF7b7mof8HkcaSthEO8Wu9kf8ZHjE9c1TDzQGAYDYv7FN9+k9w@mail.gmail.com"

NOT_LOADED = Scenario(
    name="vcpu-not-loaded",
    title="a fault is made for a vCPU by a thread that has loaded none",
    source=_SOURCE,
    build=lambda dialect: _build(dialect, False),
    applies=reports_guest_faults,
)
ANOTHER_LOADED = Scenario(
    name="vcpu-another-loaded",
    title="a fault is made for a vCPU by a thread that has loaded another",
    source=_SOURCE,
    build=lambda dialect: _build(dialect, True),
    applies=reports_guest_faults,
)
