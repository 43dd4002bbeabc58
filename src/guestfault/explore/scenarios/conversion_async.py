"""A page is made private while a worker waits for it.

Page A, shared, must be waited for, and a worker does so.  Meanwhile the VMM makes it private.  When
the worker has done, ``kvm_arch_async_page_ready`` makes the guest's fault again, as what it was,
and drops the result.  The guest goes on; with interrupts off, so that its next fault is waited for
by the vCPU itself.  That one is in ordinary memory, in page B, which is lost.
"""

from __future__ import annotations

import errno

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Scenario
from guestfault.explore.scenarios.layout import OLD, A, B
from guestfault.explore.scenarios.private_page import FILE, applies, with_private_page
from guestfault.explore.scripted_cpu import cli, load, outb
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import END_PORT, HVA, Machine
from guestfault.memory.ram import PAGE_SIZE
from guestfault.uapi import kvm as uapi

__all__ = ["SCENARIO"]

_SCRIPT = load("rax", A), cli(), load("rbx", B), outb(END_PORT)


def _build(dialect: Dialect) -> Machine:
    machine = with_private_page(dialect, irqchip=True)
    vm, pages = machine.vm, machine.mm.pages
    machine.slot(2, B, 1, HVA + B)
    pages[HVA + A].set(OLD)
    pages[HVA + A].may_fail = 1  # for the question whether to wait
    pages[FILE].map()
    pages[HVA + B].error = errno.EFAULT
    machine.vcpu(*_SCRIPT)
    machine.prefault()

    def vmm() -> None:
        vm.set_memory_attributes(A, PAGE_SIZE, uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE)

    machine.actors["vcpu0"] = Userspace(machine, bring_in=machine.populate)
    machine.actors["vmm"] = vmm
    return machine


SCENARIO = Scenario(
    name="conversion-async",
    title="a page is made private while a worker waits for it, then one fails that is lost",
    source="arch/x86/kvm/mmu/mmu.c, kvm_arch_async_page_ready(), kvm_mmu_faultin_pfn()",
    build=_build,
    applies=applies,
)
