"""A slot is deleted, or moved, while a vCPU faults in it.

When ``KVM_SET_USER_MEMORY_REGION`` returns, no vCPU touches the old slot's memory any more, and
userspace may unmap it.  What the guest does there afterwards goes to a device, or to wherever the
slot is now.
"""

from __future__ import annotations

from guestfault.dialect.record import Dialect
from guestfault.explore.model_mm import NO_VMA
from guestfault.explore.scenario import Scenario
from guestfault.explore.scenarios.layout import OLD, OLD_VALUE, PAGES, A, B
from guestfault.explore.scripted_cpu import load, outb, store
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import END_PORT, HVA, Machine
from guestfault.memory.ram import PAGE_SIZE

__all__ = ["DELETE", "MOVE"]

_NEW, _DEVICE = b"new!", b"dev."
_NEW_VALUE, _DEVICE_VALUE = (int.from_bytes(data, "little") for data in (_NEW, _DEVICE))
_SCRIPT = load("rax", A), store(A, _NEW), load("rbx", A), outb(END_PORT)


def _base(dialect: Dialect) -> tuple[Machine, Userspace]:
    machine = Machine(dialect, PAGES)
    machine.slot(0, 0, 2, HVA)
    machine.mm.pages[HVA + A].set(OLD)
    machine.mm.pages[HVA + A].map()
    machine.slot(1, A, 1, HVA + A)
    machine.vcpu(*_SCRIPT)
    machine.prefault()
    vcpu = Userspace(
        machine,
        bring_in=machine.populate,
        devices={A: _DEVICE},
        expected_writes=((A, _NEW),),
    )
    machine.actors["vcpu0"] = vcpu

    def check() -> None:
        machine.expect_registers(
            0,
            {"rax": OLD_VALUE, "rbx": _NEW_VALUE},
            {"rax": OLD_VALUE, "rbx": _DEVICE_VALUE},
            {"rax": _DEVICE_VALUE, "rbx": _DEVICE_VALUE},
        )
        if not vcpu.stopped:
            machine.expect_memory(HVA + A, OLD if vcpu.written else _NEW)

    machine.check = check
    return machine, vcpu


def _build_delete(dialect: Dialect) -> Machine:
    machine, _ = _base(dialect)

    def vmm() -> None:
        machine.slot(1, A, 0, HVA + A)
        machine.mm.protect(HVA + A, PAGE_SIZE, NO_VMA)

    machine.actors["vmm"] = vmm
    return machine


def _build_move(dialect: Dialect) -> Machine:
    machine, _ = _base(dialect)
    machine.actors["vmm"] = lambda: machine.slot(1, B, 1, HVA + A)
    return machine


_SOURCE = "virt/kvm/kvm_main.c, kvm_set_memslot(); Documentation/virt/kvm/locking.rst"

DELETE = Scenario(
    name="slot-deleted",
    title="a slot is deleted and its memory unmapped while a vCPU faults in it",
    source=_SOURCE,
    build=_build_delete,
)
MOVE = Scenario(
    name="slot-moved",
    title="a slot is moved while a vCPU faults in it",
    source=_SOURCE,
    build=_build_move,
)
