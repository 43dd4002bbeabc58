"""Which KVM to run on, and why that one."""

from __future__ import annotations

from dataclasses import dataclass

from guestfault.dialect.interface import probe
from guestfault.dialect.published import missing_flag
from guestfault.errors import Unavailable
from guestfault.kvm.protocols import System
from guestfault.kvm.system import KvmSystem
from guestfault.linux.userfaultfd import Userfaultfd
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
    soft = SoftSystem(dialect or DEFAULT_DIALECT)
    if kvm == "soft" or dialect is not None:
        return Choice(soft)
    why_not = ""
    try:
        system = KvmSystem()
    except Unavailable as error:
        return Choice(soft, f"no real KVM here ({error.what}: {error.why})")
    try:
        why_not = _why_not(system, mode)
    except Unavailable as error:
        why_not = str(error)
    if why_not:
        system.close()
        return Choice(soft, why_not)
    soft.close()
    return Choice(system, "it is usable and can do this mode")


def _why_not(system: KvmSystem, mode: Mode) -> str:
    """Why the real KVM will not do, or nothing."""
    if mode is Mode.UFFD:
        Userfaultfd.open().close()
        return ""
    vm = system.create_vm()
    try:
        if missing_flag(probe(vm.check_extension), vm.check_extension) is None:
            return f"{system.name} does not say which access to ordinary memory failed"
    finally:
        vm.close()
    return ""
