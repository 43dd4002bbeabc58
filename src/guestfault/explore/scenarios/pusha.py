"""PUSHA, with a device in the midst of its frame: an exit is prepared, and KVM goes on.

KVM's emulator prepares the exit for a write to a device as soon as it comes to it, and goes on with
the instruction.  What follows can fail, too.  Here the first word goes to a device, and the seven
that follow to a page below, which is absent or lost; or, in the third world, beyond the limit of
the stack segment: then the guest gets #SS, for which a page of the stack is needed that the host
takes away at some time.
"""

from __future__ import annotations

import errno
import functools
from collections.abc import Callable

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Kind, Scenario
from guestfault.explore.scenarios.layout import B
from guestfault.explore.scripted_cpu import outb, pusha
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import END_PORT, HVA, Absence, Machine, flat_real_mode
from guestfault.memory.ram import PAGE_SIZE
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import SS_VECTOR

__all__ = ["THEN_ABSENT", "THEN_LOST", "THEN_SS"]

_DEVICE, _ABOVE = B + PAGE_SIZE, B + 2 * PAGE_SIZE
_ORDER = ("rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi")


def _frame(sp: int) -> tuple[dict[str, int], list[tuple[int, bytes]]]:
    """The registers to begin with, and what PUSHA then writes, in its order."""
    registers = {name: 0x1111 * (i + 1) for i, name in enumerate(_ORDER)} | {"rsp": sp}
    writes = [
        (sp - 2 * (i + 1), registers[name].to_bytes(2, "little")) for i, name in enumerate(_ORDER)
    ]
    return registers, writes


def _build(dialect: Dialect, lost: bool) -> Machine:
    sp = _DEVICE + 2
    registers, writes = _frame(sp)
    machine = Machine(dialect, 5)
    machine.slot(0, 0, 3, HVA)
    if lost:
        machine.mm.pages[HVA + B].error = errno.EFAULT
        machine.slot(1, B, 1, HVA + B)
        bring_in: Callable[[int], None] = machine.populate
    else:
        bring_in = machine.postcopy(1, B, 1)
    values = [registers[name] for name in _ORDER]
    machine.vcpu(pusha(sp, values), outb(END_PORT), registers=registers)
    machine.prefault()
    vcpu = Userspace(machine, bring_in=bring_in, expected_writes=writes)
    machine.actors["vcpu0"] = vcpu
    if not lost and Absence.of(dialect) is not Absence.SIGBUS:
        machine.handle_faults(bring_in)

    def check() -> None:
        if vcpu.stopped:
            return
        if vcpu.written != writes[:1]:
            machine.found(Kind.CORRUPTED, f"the device gets {vcpu.written}, not {writes[:1]}")
        for gpa, data in writes[1:]:
            machine.expect_memory(HVA + gpa, data)

    machine.check = check
    return machine


def _build_ss(dialect: Dialect) -> Machine:
    sp = _ABOVE + 6
    registers, writes = _frame(sp)
    machine = Machine(dialect, 7)
    machine.slot(0, 0, 4, HVA)
    view = machine.register(HVA + _ABOVE, 1, sigbus=True)
    machine.mm.pages[HVA + _ABOVE].map()
    machine.slot(1, _ABOVE, 1, HVA + _ABOVE)
    machine.vcpu(
        pusha(sp, [registers[name] for name in _ORDER]),
        registers=registers,
        sregs=_stack_from(_ABOVE - 2),
    )
    machine.handler(SS_VECTOR, outb(END_PORT))
    machine.prefault()

    def bring_in(_: int) -> None:
        view.bring_in(0, PAGE_SIZE)

    machine.actors["vcpu0"] = Userspace(machine, bring_in=bring_in, expected_writes=writes[3:])
    machine.actors["host"] = lambda: machine.mm.discard(HVA + _ABOVE, PAGE_SIZE)
    return machine


@functools.cache
def _stack_from(first: int) -> uapi.kvm_sregs:
    """A stack segment that begins at ``first``: one that grows down."""
    sregs = uapi.kvm_sregs.from_buffer_copy(flat_real_mode())
    sregs.ss.type, sregs.ss.limit = 7, first - 1
    return sregs


_SOURCE = "ZBNrWZQhMX8AHzWM@google.com"

THEN_ABSENT = Scenario(
    name="pusha-then-absent",
    title="PUSHA writes to a device, and then to a page that is absent",
    source="ZIn6VQSebTRN1jtX@google.com",
    build=lambda dialect: _build(dialect, False),
)
THEN_LOST = Scenario(
    name="pusha-then-lost",
    title="PUSHA writes to a device, and then to a page that is lost",
    source="ZIn6VQSebTRN1jtX@google.com",
    build=lambda dialect: _build(dialect, True),
)
THEN_SS = Scenario(
    name="pusha-then-ss",
    title="PUSHA writes to a device, and then beyond its stack: #SS",
    source=_SOURCE,
    build=_build_ss,
)
