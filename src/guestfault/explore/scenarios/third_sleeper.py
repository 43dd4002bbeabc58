"""Two vCPUs let the page in themselves and wake nobody; a third thread sleeps in it.

With the series the thread of a vCPU resolves its own fault, and needs no wake-up for that
(``UFFDIO_CONTINUE_MODE_DONTWAKE``, as the series' own test does).  But the slot's flag is for the
guest's faults only.  Who touches the page in another way, KVM's emulation or a vhost thread, sleeps
in userfaultfd, and there is a handler for it, whose ``UFFDIO_CONTINUE`` fails with EEXIST when a
vCPU was faster; and that failure wakes nobody.
"""

from __future__ import annotations

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Kind, Scenario
from guestfault.explore.scenarios.layout import OLD, OLD_VALUE, PAGES, A
from guestfault.explore.scripted_cpu import load, outb
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import END_PORT, HVA, Absence, Machine
from guestfault.linux.userfaultfd import PageFault
from guestfault.memory.ram import PAGE_SIZE
from guestfault.softkvm.preempt import preemption_point, wait

__all__ = ["SCENARIO"]

_SCRIPT = load("rax", A), outb(END_PORT)


def _build(dialect: Dialect) -> Machine:
    machine = Machine(dialect, PAGES)
    machine.slot(0, 0, 2, HVA)
    machine.mm.pages[HVA + A].set(OLD)
    let_in = machine.postcopy(1, A, 1)
    uffd = machine.uffd
    assert uffd is not None
    over = False

    def let_in_silently(hva: int) -> None:
        uffd.continue_(hva, PAGE_SIZE, dontwake=True)
        if Absence.of(dialect) is Absence.BITMAP:
            machine.set_userfault(0, False)

    def vhost() -> None:
        nonlocal over
        if machine.mm.copy_from_user(HVA + A, len(OLD)) != OLD:
            machine.found(Kind.MEMORY, "the vhost thread does not read what is in the page")
        preemption_point("vhost: has read", "uffd", True)
        over = True

    def handler() -> None:
        while True:
            wait("handler: poll", "uffd", lambda: over or uffd.readable())
            if over:
                return
            for event in uffd.read_events():
                assert isinstance(event, PageFault)
                let_in(event.address)

    for number in range(2):
        machine.vcpu(*_SCRIPT)
        machine.actors[f"vcpu{number}"] = Userspace(machine, number, bring_in=let_in_silently)
    machine.prefault()
    machine.actors["vhost"] = vhost
    machine.actors["handler"] = handler

    def check() -> None:
        for number in range(2):
            machine.expect_registers(number, {"rax": OLD_VALUE})

    machine.check = check
    return machine


def _applies(dialect: Dialect) -> str | None:
    if Absence.of(dialect) is Absence.SIGBUS:
        return "accesses to absent pages fail here for everybody, and nobody sleeps"
    return None


SCENARIO = Scenario(
    name="third-sleeper",
    title="two vCPUs let a page in and wake nobody, and a third thread sleeps in it",
    source="20240215235405.368539-1-amoorthy@google.com",
    build=_build,
    applies=_applies,
)
