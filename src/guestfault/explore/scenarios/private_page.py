"""The machine of the scenarios in which a page is converted: page A has two memories behind it."""

from __future__ import annotations

from guestfault.dialect.record import Dialect
from guestfault.explore.model_gmem import ModelGmemFiles
from guestfault.explore.scenarios.layout import PAGES, A
from guestfault.explore.world import HVA, Machine
from guestfault.memory.ram import PAGE_SIZE
from guestfault.uapi import kvm as uapi

__all__ = ["FILE", "applies", "with_private_page"]

FILE = HVA + PAGES * PAGE_SIZE
"""Where KVM has the page's guest_memfd mapped."""


def with_private_page(dialect: Dialect, *, irqchip: bool = False) -> Machine:
    """A VM of the type that has private memory; slot 0 is the code, slot 1 page A, shared as yet.

    What is behind the two memories is the scenario's, and so are the vCPUs.
    """
    machine = Machine(dialect, PAGES + 1, vm_type=uapi.KVM_X86_SW_PROTECTED_VM)
    vm = machine.vm
    machine.kvm.gmem_files = ModelGmemFiles(machine.mm, FILE)
    if irqchip:
        vm.create_irqchip()
    machine.slot(0, 0, 2, HVA)
    file = vm.create_guest_memfd(PAGE_SIZE)
    vm.set_user_memory_region2(1, A, PAGE_SIZE, HVA + A, uapi.KVM_MEM_GUEST_MEMFD, file)
    return machine


def applies(dialect: Dialect) -> str | None:
    """Whether the dialect has such memory, and if not why not."""
    return None if dialect.has_guest_memfd else "it has no private memory here"
