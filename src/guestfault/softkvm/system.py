"""The software KVM as userspace finds it: what opening ``/dev/kvm`` gives."""

from __future__ import annotations

from guestfault.dialect.published import dialect_named
from guestfault.dialect.record import Dialect
from guestfault.softkvm.capabilities import check_extension
from guestfault.softkvm.mm import HostMm
from guestfault.softkvm.vm import SoftVm

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
        return check_extension(self.dialect, cap)

    def create_vm(self) -> SoftVm:
        """``KVM_CREATE_VM``."""
        return SoftVm(self.dialect, self._mm, tdp_enabled=self.tdp_enabled)

    def close(self) -> None:
        """Close what it opened; its VMs must be closed first."""
        self._mm.close()
