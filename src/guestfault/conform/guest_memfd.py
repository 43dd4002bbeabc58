"""Conditions of guest_memfd: memory that KVM has a file of, rather than an address.

Since Linux 6.18 such a file can be mapped (``GUEST_MEMFD_FLAG_MMAP``), and then serves all of a
guest's faults in its slot; before, and without the flag, it serves *private* memory only, which
takes a VM of another type and memory attributes.
"""

from __future__ import annotations

import errno
import os

from guestfault.conform import places
from guestfault.conform.bench import TARGET_SLOT, Bench
from guestfault.conform.condition import THE_PAGE, Arranged, Condition, by_name
from guestfault.errors import KernelError, Unavailable
from guestfault.kvm.protocols import Vm
from guestfault.linux.mapping import Mapping
from guestfault.linux.memfd import Memfd
from guestfault.uapi import kvm as uapi

__all__ = ["GUEST_MEMFD", "bind", "vm_with"]

_MAPPABLE = uapi.GUEST_MEMFD_FLAG_MMAP | uapi.GUEST_MEMFD_FLAG_INIT_SHARED


def vm_with(bench: Bench, cap: int, bits: int = 0) -> Vm:
    """The bench's VM, if it has guest_memfd and all ``bits`` of a capability."""
    vm = bench.vm
    for needed, wanted in ((uapi.KVM_CAP_GUEST_MEMFD, 0), (cap, bits)):
        found = vm.check_extension(needed)
        if found <= 0 or found & wanted != wanted:
            raise Unavailable("guest_memfd", f"capability {needed} is {max(found, 0)}")
    return vm


def bind(bench: Bench, vm: Vm, fd: int, hva: int = 0) -> None:
    """Put a guest_memfd into the target's slot, and the target's memory beside it."""
    where = places.TARGET, places.TARGET_SIZE, hva or bench.target.guest.address
    vm.set_user_memory_region2(TARGET_SLOT, *where, uapi.KVM_MEM_GUEST_MEMFD, guest_memfd=fd)


def _mapped(bench: Bench) -> tuple[Memfd, Mapping, Arranged]:
    """The target in a guest_memfd that is mapped here."""
    vm = vm_with(bench, uapi.KVM_CAP_GUEST_MEMFD_FLAGS, _MAPPABLE)
    fd = vm.create_guest_memfd(places.TARGET_SIZE, _MAPPABLE)
    memfd = Memfd.adopt(fd, "guest_memfd", places.TARGET_SIZE)
    arranged = Arranged(lambda: None)
    arranged.to_close.callback(memfd.close)
    mapping = Mapping.from_memfd(memfd)
    arranged.to_close.callback(mapping.close)
    bench.target.bytes = mapping.view()
    bench.target.write(0, 4)
    bind(bench, vm, fd, mapping.address)
    return memfd, mapping, arranged


def _gmem(bench: Bench) -> Arranged:
    return _mapped(bench)[2]


def _elsewhere(bench: Bench) -> Arranged:
    """The slot's address is not where the file is mapped: KVM's own accesses go by the address."""
    memfd, _, arranged = _mapped(bench)
    bench.remove_target()
    bind(bench, bench.vm, memfd.fd)
    return arranged


def _punched(bench: Bench) -> Arranged:
    memfd, _, arranged = _mapped(bench)
    memfd.punch_hole(*THE_PAGE)
    return arranged


def _hwpoison(bench: Bench) -> Arranged:
    memfd, mapping, arranged = _mapped(bench)
    try:
        mapping.hwpoison(*THE_PAGE)
    except KernelError as error:
        # The page is poisoned, and stays in the file, which the kernel counts as a failure.
        if error.errno != errno.EBUSY:
            raise

    def mend() -> None:
        memfd.punch_hole(*THE_PAGE)
        mapping.discard(*THE_PAGE)
        bench.target.write(1)

    arranged.mend = mend
    return arranged


def _closed(bench: Bench) -> Arranged:
    vm = vm_with(bench, uapi.KVM_CAP_GUEST_MEMFD_FLAGS, _MAPPABLE)
    fd = vm.create_guest_memfd(places.TARGET_SIZE, _MAPPABLE)
    bind(bench, vm, fd)
    os.close(fd)

    def mend() -> None:
        # An ordinary slot in its place: what was in the file is gone.
        bench.remove_target()
        bench.target.write(0, 4)
        bench.set_target()

    return Arranged(mend)


GUEST_MEMFD: dict[str, Condition] = by_name(
    Condition("gmem", "in a guest_memfd that is mapped", _gmem),
    Condition("gmem-elsewhere", "in a guest_memfd, the slot's address elsewhere", _elsewhere),
    Condition("gmem-punched", "a hole punched into a guest_memfd", _punched),
    Condition("gmem-closed", "in a guest_memfd that was closed", _closed),
    Condition(
        "gmem-hwpoison", "MADV_HWPOISON in a guest_memfd", _hwpoison, hostile=True, in_child=True
    ),
)
"""By their names."""
