"""The host takes a page away between its lookup and its entry.

``kvm_faultin_pfn`` finds a page without holding any lock, ``direct_map`` installs it under
``mmu_lock``; in between the host may unmap it.  ``mmu_invalidate_seq`` is there for that, and the
flush that makes every processor forget what it has in its TLB.  What a VMM does to cause it, a
balloon for one, comes in two ways: the page's content stays (``MADV_DONTNEED`` on shared memory) or
goes with it (a hole is punched).
"""

from __future__ import annotations

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Scenario
from guestfault.explore.scenarios.layout import OLD, OLD_VALUE, A, plain
from guestfault.explore.scheduler import choose
from guestfault.explore.scripted_cpu import load, outb, store
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import END_PORT, HVA, Machine
from guestfault.memory.ram import PAGE_SIZE

__all__ = ["SCENARIO"]

_NEW = b"new!"
_NEW_VALUE = int.from_bytes(_NEW, "little")
_SCRIPT = load("rax", A), store(A, _NEW), load("rbx", A), outb(END_PORT)


def _build(dialect: Dialect) -> Machine:
    machine = plain(dialect, _SCRIPT)
    machine.mm.pages[HVA + A].set(OLD)
    machine.mm.pages[HVA + A].map()
    punched = False

    def host() -> None:
        nonlocal punched
        if choose("MADV_DONTNEED, or a hole is punched", 2):
            punched = True
            machine.mm.punch_hole(HVA + A, PAGE_SIZE)
        else:
            machine.mm.discard(HVA + A, PAGE_SIZE)

    def check() -> None:
        if not punched:
            machine.expect_registers(0, {"rax": OLD_VALUE, "rbx": _NEW_VALUE})
            machine.expect_memory(HVA + A, _NEW)
            return
        machine.expect_registers(
            0,
            {"rax": OLD_VALUE, "rbx": _NEW_VALUE},
            {"rax": OLD_VALUE, "rbx": 0},
            {"rax": 0, "rbx": _NEW_VALUE},
        )
        machine.expect_memory(HVA + A, _NEW, bytes(4))

    machine.actors["vcpu0"] = Userspace(machine, bring_in=machine.populate)
    machine.actors["host"] = host
    machine.check = check
    return machine


SCENARIO = Scenario(
    name="invalidation",
    title="the host takes a page away between its lookup and its entry",
    source="Documentation/virt/kvm/locking.rst; virt/kvm/kvm_main.c, mmu_invalidate_retry()",
    build=_build,
)
