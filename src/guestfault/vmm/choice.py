"""Which KVM to run on, and why that one."""

from __future__ import annotations

from dataclasses import dataclass

from guestfault.dialect.interface import probe
from guestfault.dialect.published import missing_flag
from guestfault.errors import Unavailable
from guestfault.kvm.protocols import System
from guestfault.kvm.system import KvmSystem
from guestfault.softkvm.system import SoftSystem
from guestfault.vmm.session import Mode

__all__ = ["KVMS", "Choice", "choose"]

KVMS = ("auto", "soft", "kvm")
DEFAULT_DIALECT = "seed"


@dataclass(frozen=True, slots=True)
class Choice:
    """A KVM, and ``why`` it was taken: empty if it was asked for."""

    system: System
    why: str = ""


def choose(kvm: str, dialect: str | None, mode: Mode) -> Choice:
    """Open the KVM that was asked for, or for ``auto`` the one that can do ``mode``.

    ``dialect`` is one of the software KVM's and so asks for it.  Raises
    :class:`~guestfault.errors.Unavailable` for a KVM or dialect that is not to be had.
    """
    if kvm == "kvm":
        if dialect is not None:
            raise Unavailable(
                f"--dialect {dialect}",
                "/dev/kvm speaks the running kernel's own",
                "leave it out, or use --kvm soft",
            )
        return Choice(KvmSystem())
    if kvm == "soft" or dialect is not None:
        return Choice(SoftSystem(dialect or DEFAULT_DIALECT))
    try:
        system = KvmSystem()
    except Unavailable as error:
        why = f"no real KVM here ({error.what}: {error.why})"
        return Choice(SoftSystem(DEFAULT_DIALECT), why)
    if mode is Mode.UFFD or _names_missing_pages(system):
        return Choice(system, "it is usable and can do this mode")
    system.close()
    why = f"{system.name} does not say which access to ordinary memory failed"
    return Choice(SoftSystem(DEFAULT_DIALECT), why)


def _names_missing_pages(system: KvmSystem) -> bool:
    """Whether ordinary memory of its VMs can ask for an annotated exit on a missing page."""
    vm = system.create_vm()
    try:
        return missing_flag(probe(vm.check_extension), vm.check_extension) is not None
    finally:
        vm.close()
