"""The software KVM as userspace finds it: what opening ``/dev/kvm`` gives."""

from __future__ import annotations

import errno

from guestfault.dialect.published import dialect_named
from guestfault.dialect.record import Dialect
from guestfault.errors import KvmError
from guestfault.softkvm.capabilities import check_extension, vm_types
from guestfault.softkvm.mm import HostMm
from guestfault.softkvm.vm import SoftVm
from guestfault.uapi import kvm as uapi

__all__ = ["SoftSystem"]


class SoftSystem:
    """A KVM in software, speaking one published version of the memory-fault interface.

    ``dialect`` is a record or its name; raises :class:`~guestfault.errors.Unavailable` for a name
    that is not one.  Without ``tdp_enabled`` it keeps shadow page tables, as a KVM loaded with
    ``npt=0`` or ``ept=0`` does.  Needs no privileges and no device.

    >>> SoftSystem("seed").name
    'softkvm (seed)'
    """

    def __init__(self, dialect: Dialect | str = "seed", *, tdp_enabled: bool = True) -> None:
        self.dialect = dialect_named(dialect) if isinstance(dialect, str) else dialect
        self.tdp_enabled = tdp_enabled
        self._mm = HostMm()

    @property
    def name(self) -> str:
        """What it is, for people."""
        return f"softkvm ({self.dialect.name}{'' if self.tdp_enabled else ', npt=0'})"

    def check_extension(self, cap: int) -> int:
        """``KVM_CHECK_EXTENSION``."""
        return check_extension(self.dialect, cap, tdp_enabled=self.tdp_enabled)

    def create_vm(self, vm_type: int = uapi.KVM_X86_DEFAULT_VM) -> SoftVm:
        """``KVM_CREATE_VM`` of a type; EINVAL for one that ``KVM_CAP_VM_TYPES`` does not have."""
        if vm_type < 0 or not vm_types(self.dialect, self.tdp_enabled) >> vm_type & 1:
            raise KvmError("KVM_CREATE_VM", errno.EINVAL, f"VM type {vm_type}")
        return SoftVm(self.dialect, self._mm, tdp_enabled=self.tdp_enabled, vm_type=vm_type)

    def close(self) -> None:
        """Close what it opened; its VMs must be closed first."""
        self._mm.close()
