"""How a KVM says that it could not resolve a guest's access to memory.

A failed access leaves ``KVM_RUN`` as a pair: the result of the ioctl and ``kvm_run.exit_reason``.
Only one combination of the two says that ``kvm_run.memory_fault`` was filled just now; with any
other the union holds whatever an earlier exit left there.  Which combination that is has changed
from one version of the interface to the next: the exit was 38 before it became 39, the result was
-EPERM in one version and 0 in another, and the numbers of its first drafts have since been given to
other things (38 is ``KVM_EXIT_LOONGARCH_IOCSR`` today).  So the combination is data: one
:class:`MemoryFaultInterface` for each interface, chosen by :func:`probe` with the capability that
announces it, and handed to :func:`guestfault.fault.outcome.outcome`.  A KVM that announces none has
no memory-fault exit at all, and its interface is ``None``.

All of them fill the same three ``u64``: ``flags``, ``gpa`` and a length in bytes.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from guestfault.uapi import kvm as uapi

__all__ = ["EHWPOISON", "LINUX_6_8", "SEED", "MemoryFaultInterface", "probe"]

EHWPOISON: Final = 133  # asm-generic/errno.h; Python's errno has it from 3.14 on


@dataclass(frozen=True, slots=True)
class MemoryFaultInterface:
    """One published way of reporting a memory fault.

    ``errnos`` are the errnos, positive, of a ``KVM_RUN`` that fails with this exit; 0 among them
    stands for a ``KVM_RUN`` that succeeds with it.  ``flags`` maps the name of each bit of
    ``memory_fault.flags`` to its value.
    """

    cap: int
    exit_reason: int
    errnos: frozenset[int]
    flags: Mapping[str, int] = field(hash=False)

    def is_memory_fault(self, ret: int, exit_reason: int) -> bool:
        """Whether a result of ``KVM_RUN`` is the combination that vouches for ``memory_fault``."""
        return exit_reason == self.exit_reason and -ret in self.errnos

    def flag_names(self, flags: int) -> tuple[str, ...]:
        """The names of the bits set in ``memory_fault.flags``, those without a name in hexadecimal.

        >>> LINUX_6_8.flag_names(0x18)
        ('PRIVATE', '0x10')
        """
        names = [name for name, bit in self.flags.items() if flags & bit]
        unnamed = flags & ~sum(self.flags.values())
        return (*names, f"{unnamed:#x}") if unnamed else tuple(names)


LINUX_6_8 = MemoryFaultInterface(
    cap=uapi.KVM_CAP_MEMORY_FAULT_INFO,
    exit_reason=uapi.KVM_EXIT_MEMORY_FAULT,
    errnos=frozenset({errno.EFAULT, EHWPOISON}),
    flags=MappingProxyType({"PRIVATE": uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE}),
)
"""What Linux has had since 6.8 (``Documentation/virt/kvm/api.rst``, ``KVM_EXIT_MEMORY_FAULT``)."""

SEED = MemoryFaultInterface(
    cap=227,  # KVM_CAP_X86_MEMORY_FAULT_EXIT, never merged
    exit_reason=38,
    errnos=frozenset({errno.EFAULT}),
    flags=MappingProxyType({"UNKNOWN": 1 << 0, "ABSENT_MAPPING": 1 << 1}),
)
"""The interface of March 2023: the numbers of WIP v2, with the result (-EFAULT) and without the
opt-in that its discussion settled on."""

_BY_PREFERENCE = (LINUX_6_8, SEED)


def probe(check_extension: Callable[[int], int]) -> MemoryFaultInterface | None:
    """The interface that a KVM announces, the merged one first; ``None`` if it announces none.

    ``check_extension`` is :meth:`~guestfault.kvm.protocols.Vm.check_extension` of the VM that will
    run: the system's own answer can differ.

    Having the interface does not mean that every fault is annotated: Linux announces it, and fails
    with a bare errno wherever ordinary memory cannot be had.
    """
    return next((known for known in _BY_PREFERENCE if check_extension(known.cap) > 0), None)
