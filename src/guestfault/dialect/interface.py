"""How a KVM says that it could not resolve a guest's access to memory.

A failed access leaves ``KVM_RUN`` as a pair: the result of the ioctl and ``kvm_run.exit_reason``.
Only one combination of the two says that ``kvm_run.memory_fault`` was filled just now; with any
other the union holds whatever an earlier exit left there.  Which combination that is has changed
from one version of the interface to the next: the exit was 38 before it became 39, the result was
-EPERM in one version, and one left ``exit_reason`` alone and said it by a bit of ``kvm_run.flags``,
with the payload in a second union behind everything else.  Of those numbers some have since been
given to other things (38 is ``KVM_EXIT_LOONGARCH_IOCSR`` today).  So the combination is data: one
:class:`MemoryFaultInterface` for each interface, handed to
:func:`guestfault.fault.outcome.outcome`.  A KVM that announces none has no memory-fault exit at
all, and its interface is ``None``.

All of them fill the same three ``u64``: ``flags``, ``gpa`` and a length in bytes, whose name has
been ``size``, ``len``, and ``size`` again.

**Which one a KVM speaks**, its capabilities do not always tell (:func:`probe`), for the versions
that were never merged used each other's numbers, and Linux has given them away since:

===========  ========================  =====================================================
capability   in the series             in released kernels, on x86
===========  ========================  =====================================================
226          v1                        PMU_EVENT_MASKED_EVENTS (6.3)
227 to 230   WIP v2, v3, v4, v5        never: other architectures have them
231          v5                        USER_MEMORY2 (6.8), always together with 232
232          v6, v7, KVM Userfault     MEMORY_FAULT_INFO (6.8)
236          v6, v7                    PRE_FAULT_MEMORY (6.11)
243          KVM Userfault v3          never: arm64 has it
===========  ========================  =====================================================

Two things settle it.  Who has 232 has the merged exit, whatever else it has: v6, v7 and KVM
Userfault only add bits to its flags, and their combination is the same, so that nothing is misread
for their sake.  And the versions that want to be asked (v1, WIP v2, v3) report nothing to one who
has not asked; one who has asked knows whom.  What is left over has two numbers of its own: 227 with
228 and not 229 is the seed's, 228 with 229 is v4, 230 with 231 is v5.
"""

from __future__ import annotations

import enum
import errno
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from guestfault.dialect.unmerged import KVM_RUN_MEMORY_FAULT_FILLED
from guestfault.uapi import kvm as uapi

__all__ = [
    "EHWPOISON",
    "LINUX_6_8",
    "SEED",
    "USERFAULT_V3",
    "V1",
    "V3",
    "V4",
    "V5",
    "V7",
    "WIP_V2",
    "MemoryFaultInterface",
    "Payload",
    "probe",
]

EHWPOISON: Final = 133  # asm-generic/errno.h; Python's errno has it from 3.14 on
_EFAULT = frozenset({errno.EFAULT})
_MERGED = frozenset({errno.EFAULT, EHWPOISON})


class Payload(enum.Enum):
    """Where in ``kvm_run`` the fault is described."""

    UNION = "the union of all exits"
    SECOND_UNION = "a second union, behind the synchronised registers"


@dataclass(frozen=True, slots=True)
class MemoryFaultInterface:
    """One published way of reporting a memory fault.

    ``cap`` announces it.  ``errnos`` are the errnos, positive, of a ``KVM_RUN`` that fails with
    this exit; 0 among them stands for a ``KVM_RUN`` that succeeds with it.  ``flags`` maps the name
    of each bit of ``memory_fault.flags`` to its value.  ``exit_reason`` is ``None`` where it is not
    written: then ``filled_flag``, a bit of ``kvm_run.flags``, vouches for the payload.  Without
    ``flags_written`` the payload's flags are as stale as the rest of the union.
    """

    cap: int
    exit_reason: int | None
    errnos: frozenset[int]
    flags: Mapping[str, int] = field(hash=False)
    length_name: str = "size"
    payload: Payload = Payload.UNION
    filled_flag: int = 0
    flags_written: bool = True

    def is_memory_fault(self, ret: int, exit_reason: int, run_flags: int = 0) -> bool:
        """Whether a result of ``KVM_RUN`` is the combination that vouches for ``memory_fault``.

        ``run_flags`` is ``kvm_run.flags``.
        """
        if -ret not in self.errnos:
            return False
        if self.exit_reason is None:
            return run_flags & self.filled_flag != 0
        return exit_reason == self.exit_reason

    def flag_names(self, flags: int) -> tuple[str, ...]:
        """The names of the bits set in ``memory_fault.flags``, those without a name in hexadecimal.

        >>> LINUX_6_8.flag_names(0x18)
        ('PRIVATE', '0x10')
        """
        names = [name for name, bit in self.flags.items() if flags & bit]
        unnamed = flags & ~sum(self.flags.values())
        return (*names, f"{unnamed:#x}") if unnamed else tuple(names)


V1 = MemoryFaultInterface(226, 38, _EFAULT, MappingProxyType({}), flags_written=False)

WIP_V2 = MemoryFaultInterface(
    cap=227,  # KVM_CAP_X86_MEMORY_FAULT_EXIT
    exit_reason=38,
    errnos=frozenset({errno.EPERM}),
    flags=MappingProxyType({"UNKNOWN": 1 << 0, "ABSENT_MAPPING": 1 << 1}),
    length_name="len",
)
"""The version that the seed thread discusses: its helper returns -1, which is -EPERM."""

SEED = MemoryFaultInterface(227, 38, _EFAULT, WIP_V2.flags, "len")
"""The interface of March 2023: the numbers of WIP v2, with the result (-EFAULT) and without the
opt-in that its discussion settled on."""

V3 = MemoryFaultInterface(227, 38, _EFAULT, MappingProxyType({}), "len")

V4 = MemoryFaultInterface(
    228, 38, _EFAULT, MappingProxyType({"WRITE": 1 << 0, "EXEC": 1 << 1}), "len"
)

V5 = MemoryFaultInterface(
    cap=230,
    exit_reason=None,
    errnos=_EFAULT,
    flags=MappingProxyType({"READ": 1 << 0, "WRITE": 1 << 1, "EXEC": 1 << 2}),
    length_name="len",
    payload=Payload.SECOND_UNION,
    filled_flag=KVM_RUN_MEMORY_FAULT_FILLED,
)
"""Here the payload survives every other exit, and is valid only beside -EFAULT."""

LINUX_6_8 = MemoryFaultInterface(
    cap=uapi.KVM_CAP_MEMORY_FAULT_INFO,
    exit_reason=uapi.KVM_EXIT_MEMORY_FAULT,
    errnos=_MERGED,
    flags=MappingProxyType({"PRIVATE": uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE}),
)
"""What Linux has had since 6.8 (``Documentation/virt/kvm/api.rst``, ``KVM_EXIT_MEMORY_FAULT``)."""

V7 = MemoryFaultInterface(
    cap=uapi.KVM_CAP_MEMORY_FAULT_INFO,
    exit_reason=uapi.KVM_EXIT_MEMORY_FAULT,
    errnos=_MERGED,
    flags=MappingProxyType(
        {
            "READ": 1 << 0,
            "WRITE": 1 << 1,
            "EXEC": 1 << 2,
            "PRIVATE": uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE,
        }
    ),
)
"""v6 and v7: the merged exit, with the bits that it keeps for them."""

USERFAULT_V3 = MemoryFaultInterface(
    cap=uapi.KVM_CAP_MEMORY_FAULT_INFO,
    exit_reason=uapi.KVM_EXIT_MEMORY_FAULT,
    errnos=_MERGED,
    flags=MappingProxyType({"PRIVATE": uapi.KVM_MEMORY_EXIT_FLAG_PRIVATE, "USERFAULT": 1 << 4}),
)
"""KVM Userfault: the merged exit, with a bit for a page that userspace has marked."""

# By preference, with the capabilities that it has besides its own, and those that it must not have.
_ANNOUNCED: Final = (
    (LINUX_6_8, (), ()),
    (V5, (231,), ()),
    (V4, (229,), (227,)),
    (SEED, (228,), (229,)),
)


def probe(check_extension: Callable[[int], int]) -> MemoryFaultInterface | None:
    """The interface in which a KVM speaks to one who has not asked for another.

    ``None`` if it announces none.  ``check_extension`` is
    :meth:`~guestfault.kvm.protocols.Vm.check_extension` of the VM that will run: the system's own
    answer can differ.

    It never answers with an interface that must be enabled, nor with v6, v7 or KVM Userfault, whose
    numbers a released kernel has too: whoever enables one of them has its record at hand
    (:data:`guestfault.dialect.published.DIALECTS`) and decodes by that.  The module's introduction
    says why nothing is misread.  It is for x86: on arm64 released kernels have 227 to 230.

    Having the interface does not mean that every fault is annotated: Linux announces it, and fails
    with a bare errno wherever ordinary memory cannot be had.
    """

    def announced(cap: int) -> bool:
        return check_extension(cap) > 0

    for known, also, lacks in _ANNOUNCED:
        if announced(known.cap) and all(map(announced, also)) and not any(map(announced, lacks)):
            return known
    return None
