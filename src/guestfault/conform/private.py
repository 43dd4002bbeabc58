"""Conditions of private memory: pages that only the guest may see.

A VM of the type ``KVM_X86_SW_PROTECTED_VM`` has them without hardware for it, in a kernel with
``CONFIG_KVM_SW_PROTECTED_VM``.  Each page has an attribute that says which of two memories it is
in: the guest_memfd of its slot, or, *shared*, the slot's host address.

Hardware that protects a guest tells KVM which of them an access wants, and the exit
``KVM_EXIT_MEMORY_FAULT`` is how KVM says that the attribute has it otherwise.  A VM of this type
has no such hardware: there the attribute itself decides what the access is
(``kvm_mmu_page_fault``, ``arch/x86/kvm/mmu/mmu.c``), the two agree but for a conversion under way,
and the exit is left for private memory that cannot be had.
"""

from __future__ import annotations

import os

from guestfault.conform import places
from guestfault.conform.bench import Bench
from guestfault.conform.condition import THE_PAGE, Arranged, Condition, by_name
from guestfault.conform.guest_memfd import bind, vm_with
from guestfault.errors import Unavailable
from guestfault.kvm.protocols import System, Vm
from guestfault.uapi import kvm as uapi
from guestfault.uapi.mman import PROT_NONE, PROT_READ, PROT_WRITE

__all__ = ["PRIVATE", "set_private"]

_TYPE = "KVM_X86_SW_PROTECTED_VM"
_PRIVATE = uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE


def _create_protected(system: System) -> Vm:
    types = max(system.check_extension(uapi.KVM_CAP_VM_TYPES), 0)
    if not types >> uapi.KVM_X86_SW_PROTECTED_VM & 1:
        why = f"capability {uapi.KVM_CAP_VM_TYPES} is {types:#x}"
        mend = "a kernel with CONFIG_KVM_SW_PROTECTED_VM, and nested paging"
        raise Unavailable(_TYPE, why, mend)
    return system.create_vm(uapi.KVM_X86_SW_PROTECTED_VM)


def _vm(bench: Bench) -> Vm:
    return vm_with(bench, uapi.KVM_CAP_MEMORY_ATTRIBUTES, _PRIVATE)


def set_private(bench: Bench, private: bool) -> None:
    """Make the page private, or shared."""
    _vm(bench).set_memory_attributes(places.THE_PAGE, places.PAGE, _PRIVATE if private else 0)


def _with_file(bench: Bench) -> tuple[int, Arranged]:
    """Shared, in a slot that has a guest_memfd: the file, and a mend that makes the page shared."""
    vm = _vm(bench)
    bench.target.write(0, 4)
    fd = vm.create_guest_memfd(places.TARGET_SIZE)
    bind(bench, vm, fd)
    return fd, Arranged(lambda: set_private(bench, False))


def _convertible(bench: Bench) -> Arranged:
    fd, arranged = _with_file(bench)
    arranged.to_close.callback(os.close, fd)
    return arranged


def _private(bench: Bench) -> Arranged:
    """The file begins empty, and nobody but the guest can fill it."""
    arranged = _convertible(bench)
    set_private(bench, True)
    return arranged


def _closed(bench: Bench) -> Arranged:
    fd, arranged = _with_file(bench)
    set_private(bench, True)
    os.close(fd)
    return arranged


def _no_file(bench: Bench) -> Arranged:
    bench.target.write(0, 4)
    bench.set_target()
    set_private(bench, True)
    return Arranged(lambda: set_private(bench, False))


def _no_slot(bench: Bench) -> Arranged:
    bench.target.write(0, 4)
    set_private(bench, True)

    def mend() -> None:
        bench.set_target()
        set_private(bench, False)

    return Arranged(mend)


def _shared_prot_none(bench: Bench) -> Arranged:
    """Nothing private about it: how an ordinary failure looks in a VM of this type."""
    arranged = _convertible(bench)
    guest = bench.target.guest
    guest.protect(*THE_PAGE, PROT_NONE)
    arranged.mend = lambda: guest.protect(*THE_PAGE, PROT_READ | PROT_WRITE)
    return arranged


PRIVATE: dict[str, Condition] = by_name(
    *(
        Condition(name, title, arrange, create_vm=_create_protected)
        for name, title, arrange in (
            ("private", "private, in a guest_memfd", _private),
            ("private-no-gmem", "private, in a slot without a guest_memfd", _no_file),
            ("private-closed", "private, in a guest_memfd that was closed", _closed),
            ("private-no-slot", "private, and in no slot", _no_slot),
            ("shared-prot-none", "shared, beside a guest_memfd, and PROT_NONE", _shared_prot_none),
            ("converted", "shared, private, shared and private again", _convertible),
        )
    )
)
"""By their names."""
