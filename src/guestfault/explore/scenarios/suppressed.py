"""A fault whose failure nobody hears of, and then, in the same KVM_RUN, one that comes back.

The first is ``kvm_arch_async_page_ready``'s.  Page A must be waited for, and faulting it in may
fail: for the worker, who ignores that, and again for KVM, which tries once more on the guest's
behalf and drops the result.  Then it can be had after all, and the guest goes on; with interrupts
off, so that its next fault is waited for by the vCPU itself.  That one fails, too.

Meanwhile userspace begins to ask for exits, or does not.  There are two worlds, for there are two
kinds of a second failure: B is absent until userspace lets it in, or B is lost, and then nothing
that userspace has asked for is about it.
"""

from __future__ import annotations

import errno

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Scenario
from guestfault.explore.scenarios.async_world import apf_machine, asks_for_exits
from guestfault.explore.scenarios.layout import OLD, OLD_VALUE, A, B
from guestfault.explore.scheduler import choose
from guestfault.explore.scripted_cpu import cli, load, outb
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import END_PORT, HVA, Machine
from guestfault.memory.ram import PAGE_SIZE

__all__ = ["THEN_ABSENT", "THEN_LOST"]

_FAILURES = 3  # one for the question whether to wait, one for the worker, one for KVM
_SCRIPT = load("rax", A), cli(), load("rbx", B), outb(END_PORT)


def _build(dialect: Dialect, lost: bool) -> Machine:
    machine = apf_machine(dialect)
    page_a, page_b = machine.mm.pages[HVA + A], machine.mm.pages[HVA + B]
    page_a.set(OLD)
    page_a.may_fail = _FAILURES
    page_b.set(OLD)
    view = machine.register(HVA + B, 1, sigbus=True)
    if lost:
        page_b.error = errno.EFAULT
    machine.slot(1, A, 2, HVA + A)
    machine.vcpu(*_SCRIPT)
    machine.prefault()

    def bring_in(hva: int) -> None:
        if hva == HVA + A or lost:
            machine.populate(hva)
        else:
            view.bring_in(0, PAGE_SIZE)
        if machine.bitmap_hva:
            machine.set_userfault((hva - (HVA + A)) // PAGE_SIZE, False)

    def vmm() -> None:
        if choose("userspace asks for exits, or does not", 2) == 0:
            asks_for_exits(machine)
            if lost and machine.bitmap_hva:
                machine.set_userfault(1, False)  # B is not to come from anywhere else
            bring_in(HVA + A)

    vcpu = Userspace(machine, bring_in=bring_in)
    machine.actors["vcpu0"] = vcpu
    machine.actors["vmm"] = vmm
    machine.check = lambda: machine.expect_registers(0, {"rax": OLD_VALUE, "rbx": OLD_VALUE})
    return machine


_SOURCE = "ZIn6VQSebTRN1jtX@google.com"

THEN_ABSENT = Scenario(
    name="suppressed-then-absent",
    title="a failure that is dropped, then one on a page that is absent",
    source=_SOURCE,
    build=lambda dialect: _build(dialect, False),
)
THEN_LOST = Scenario(
    name="suppressed-then-lost",
    title="a failure that is dropped, then one on a page that is lost",
    source=_SOURCE,
    build=lambda dialect: _build(dialect, True),
)
