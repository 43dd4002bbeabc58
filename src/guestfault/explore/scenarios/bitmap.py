"""A userfault bitmap changes, or goes away, while a fault reads it.

``kvm_do_userfault`` reads the slot's bitmap from userspace memory without a lock.  Userspace lets
the page in and clears its bit while the fault is in flight; or the memory that the bitmap is in is
gone when the fault comes to read it.
"""

from __future__ import annotations

from guestfault.dialect.record import Dialect
from guestfault.explore.model_mm import NO_VMA
from guestfault.explore.scenario import Scenario
from guestfault.explore.scenarios.layout import OLD, OLD_VALUE, PAGES, A
from guestfault.explore.scripted_cpu import load, outb, store
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import END_PORT, HVA, Absence, Machine
from guestfault.memory.ram import PAGE_SIZE

__all__ = ["CLEARED", "UNREADABLE"]

_NEW = b"new!"
_SCRIPT = load("rax", A), store(A, _NEW), load("rbx", A), outb(END_PORT)


def _base(dialect: Dialect) -> tuple[Machine, Userspace]:
    machine = Machine(dialect, PAGES)
    machine.slot(0, 0, 2, HVA)
    machine.mm.pages[HVA + A].set(OLD)
    bring_in = machine.postcopy(1, A, 1)
    machine.vcpu(*_SCRIPT)
    machine.prefault()
    vcpu = Userspace(machine, bring_in=bring_in)
    machine.actors["vcpu0"] = vcpu

    def check() -> None:
        if not vcpu.stopped:
            value = int.from_bytes(_NEW, "little")
            machine.expect_registers(0, {"rax": OLD_VALUE, "rbx": value})
            machine.expect_memory(HVA + A, _NEW)

    machine.check = check
    return machine, vcpu


def _build_cleared(dialect: Dialect) -> Machine:
    machine, vcpu = _base(dialect)
    machine.actors["background copy"] = lambda: vcpu.bring_in(HVA + A)
    return machine


def _build_unreadable(dialect: Dialect) -> Machine:
    machine, _ = _base(dialect)
    bitmap = machine.bitmap_hva
    machine.actors["vmm"] = lambda: machine.mm.protect(bitmap, PAGE_SIZE, NO_VMA)
    return machine


def _applies(dialect: Dialect) -> str | None:
    return None if Absence.of(dialect) is Absence.BITMAP else "it has no bitmap"


_SOURCE = "20250618042424.330664-1-jthoughton@google.com"

CLEARED = Scenario(
    name="bitmap-cleared",
    title="a page's bit is cleared while the fault on it is in flight",
    source=_SOURCE,
    build=_build_cleared,
    applies=_applies,
)
UNREADABLE = Scenario(
    name="bitmap-unreadable",
    title="the bitmap's memory is gone when a fault comes to read it",
    source=_SOURCE,
    build=_build_unreadable,
    applies=_applies,
)
