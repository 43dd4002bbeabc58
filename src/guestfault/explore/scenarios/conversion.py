"""A page is made private while a vCPU uses it.

The page has two memories behind it, and its attribute says in which of them it is.  One thread of
the VMM converts it (``KVM_SET_MEMORY_ATTRIBUTES``), as a guest may ask on another vCPU, while this
vCPU loads from it, stores to it, and loads again.  When it is private, what was shared is free for
other uses: the guest must not come there any more.  A fault that meets the conversion comes back as
a mismatch, which tells what the access wanted; in a VM without hardware for it that is what the
attribute was before.

A VMM can take the exit in two ways.  It knows what it has made of the page, sees that the exit says
otherwise, and runs the vCPU again.  Or it *obeys*, as a VMM does in which a guest converts memory
by accessing it: it makes the page what the access wanted.
"""

from __future__ import annotations

from collections.abc import Callable

from guestfault.dialect.record import Dialect
from guestfault.explore.scenario import Kind, Scenario
from guestfault.explore.scenarios.layout import OLD, A
from guestfault.explore.scenarios.private_page import FILE, applies, with_private_page
from guestfault.explore.scripted_cpu import load, outb, store
from guestfault.explore.userspace import Userspace
from guestfault.explore.world import END_PORT, HVA, Machine
from guestfault.fault.outcome import MemoryFault
from guestfault.memory.ram import PAGE_SIZE
from guestfault.uapi import kvm as uapi

__all__ = ["ANSWERED", "OBEYED"]

_NEW, _PRIVATE, _REUSED = b"new!", b"priv", b"used"
_SCRIPT = load("rax", A), store(A, _NEW), load("rbx", A), outb(END_PORT)
_IS_PRIVATE = uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE
# What the guest has loaded, and what private memory holds then, by when the page was converted:
# before all of it, after the load, after the store, and after all.
_ALLOWED = (
    (_PRIVATE, _NEW, _NEW),
    (OLD, _NEW, _NEW),
    (OLD, _PRIVATE, _PRIVATE),
    (OLD, _NEW, _PRIVATE),
)


def _base(dialect: Dialect) -> Machine:
    machine = with_private_page(dialect)
    pages = machine.mm.pages
    for hva, content in ((HVA + A, OLD), (FILE, _PRIVATE)):
        pages[hva].set(content)
        pages[hva].map()
    machine.vcpu(*_SCRIPT)
    machine.prefault()
    return machine


def _build(dialect: Dialect, *, obeys: bool) -> Machine:
    machine = _base(dialect)

    def answer(_hva: int) -> None:
        said = vcpu.seen[-1]
        if obeys and isinstance(said, MemoryFault):
            private = said.flags & uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE
            machine.vm.set_memory_attributes(A, PAGE_SIZE, _IS_PRIVATE if private else 0)

    def convert() -> None:
        machine.vm.set_memory_attributes(A, PAGE_SIZE, _IS_PRIVATE)
        machine.mm.write_file(HVA + A, _REUSED)

    vcpu = Userspace(machine, bring_in=answer)
    machine.actors["vcpu0"] = vcpu
    machine.actors["vmm"] = convert
    machine.check = _check(machine)
    return machine


def _check(machine: Machine) -> Callable[[], None]:
    def check() -> None:
        if machine.kvm.mem_attr_array.load(A // PAGE_SIZE) != _IS_PRIVATE:
            text = f"the page at {A:#x} was made private, and is shared in the end"
            machine.found(Kind.MEMORY, text)
            return
        gprs, pages = machine.cpus[0].named_gprs(), machine.mm.pages
        found = (
            *(gprs[name].to_bytes(4, "little") for name in ("rax", "rbx")),
            bytes((pages[FILE].cached or bytes(4))[:4]),
        )
        if not machine.stopped(0) and found not in _ALLOWED:
            text = "loaded {!r} and {!r}, private memory holds {!r}".format(*found)
            machine.found(Kind.MEMORY, text)
        machine.expect_memory(HVA + A, _REUSED)

    return check


_SOURCE = "arch/x86/kvm/mmu/mmu.c, kvm_mmu_faultin_pfn(); virt/kvm/kvm_main.c"

ANSWERED = Scenario(
    name="conversion",
    title="a page is made private while a vCPU uses it; the VMM runs the vCPU again",
    source=_SOURCE,
    build=lambda dialect: _build(dialect, obeys=False),
    applies=applies,
)
OBEYED = Scenario(
    name="conversion-obeyed",
    title="the same, and the VMM makes the page what the exit says that the access wanted",
    source=_SOURCE,
    build=lambda dialect: _build(dialect, obeys=True),
    applies=applies,
)
