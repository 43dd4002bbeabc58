"""An asynchronous fault that can never succeed.

The page's mapping permits the access, and faulting it in fails all the same.  The worker ignores
that, ``kvm_arch_async_page_ready`` drops it, and the guest, told that its page is there, faults
again.  No KVM_RUN returns to say so.  There are two worlds: the page is absent in the way that the
dialect has for absent pages, and userspace would let it in if it heard of it; or the page is lost.
"""

from __future__ import annotations

import errno
from collections.abc import Callable

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Scenario
from guestfault.explore.scenarios.async_world import apf_machine
from guestfault.explore.scenarios.layout import OLD, OLD_VALUE, A
from guestfault.explore.scripted_cpu import load, outb
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import END_PORT, HVA, Machine

__all__ = ["ABSENT", "LOST"]

_SCRIPT = load("rax", A), outb(END_PORT)


def _build(dialect: Dialect, lost: bool) -> Machine:
    machine = apf_machine(dialect)
    machine.mm.pages[HVA + A].set(OLD)
    if lost:
        machine.mm.pages[HVA + A].error = errno.EFAULT
        machine.slot(1, A, 2, HVA + A)
        bring_in: Callable[[int], None] = machine.populate
    else:
        bring_in = machine.postcopy(1, A, 2)
    machine.vcpu(*_SCRIPT)
    machine.prefault()
    vcpu = Userspace(machine, bring_in=bring_in)
    machine.actors["vcpu0"] = vcpu

    def check() -> None:
        if not vcpu.stopped:
            machine.expect_registers(0, {"rax": OLD_VALUE})

    machine.check = check
    return machine


_SOURCE = "virt/kvm/async_pf.c, async_pf_execute()"

ABSENT = Scenario(
    name="async-absent",
    title="an asynchronous fault on a page that only userspace can let in",
    source=_SOURCE,
    build=lambda dialect: _build(dialect, False),
)
LOST = Scenario(
    name="async-lost",
    title="an asynchronous fault on a page that is lost",
    source=_SOURCE,
    build=lambda dialect: _build(dialect, True),
)
