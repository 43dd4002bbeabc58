"""A dirty log begins while a vCPU writes.

Live migration: userspace switches the slot's log on, copies the page, and takes the log.  A write
that the copy has missed must be in the log.
"""

from __future__ import annotations

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Kind, Scenario
from guestfault.explore.scenarios.layout import OLD, OLD_VALUE, PAGES, A
from guestfault.explore.scripted_cpu import load, outb, store
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import END_PORT, HVA, Machine
from guestfault.uapi import kvm as uapi

__all__ = ["SCENARIO"]

_NEW = b"new!"
_SCRIPT = load("rax", A), store(A, _NEW), outb(END_PORT)


def _build(dialect: Dialect) -> Machine:
    machine = Machine(dialect, PAGES)
    machine.slot(0, 0, 2, HVA)
    machine.mm.pages[HVA + A].set(OLD)
    machine.mm.pages[HVA + A].map()
    machine.slot(1, A, 1, HVA + A)
    machine.vcpu(*_SCRIPT)
    machine.prefault()
    copied = b""

    def migration() -> None:
        nonlocal copied
        machine.slot(1, A, 1, HVA + A, uapi.KVM_MEM_LOG_DIRTY_PAGES)
        copied = machine.mm.read_file(HVA + A, len(OLD))

    def check() -> None:
        machine.expect_registers(0, {"rax": OLD_VALUE})
        machine.expect_memory(HVA + A, _NEW)
        if copied != _NEW and not machine.vm.get_dirty_log(1)[0] & 1:
            machine.found(Kind.MEMORY, "a write is neither in the copy of the page nor in the log")

    machine.actors["vcpu0"] = Userspace(machine, bring_in=machine.populate)
    machine.actors["migration"] = migration
    machine.check = check
    return machine


SCENARIO = Scenario(
    name="dirty-log",
    title="a dirty log begins while a vCPU writes",
    source="Documentation/virt/kvm/locking.rst, fast page fault",
    build=_build,
)
