"""Which KVM to run on, and why that one."""

from __future__ import annotations

from dataclasses import dataclass

from guestfault.errors import Unavailable
from guestfault.kvm.protocols import System
from guestfault.kvm.system import KvmSystem
from guestfault.softkvm.system import SoftSystem

__all__ = ["KVMS", "Choice", "choose"]

KVMS = ("auto", "soft", "kvm")
DEFAULT_DIALECT = "seed"


@dataclass(frozen=True, slots=True)
class Choice:
    """A KVM, and ``why`` it was taken: empty if it was asked for."""

    system: System
    why: str = ""


def choose(kvm: str, dialect: str | None) -> Choice:
    """Open the KVM that was asked for; for ``auto`` the real one, if it is usable.

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
    return Choice(system, "it is there and usable")
