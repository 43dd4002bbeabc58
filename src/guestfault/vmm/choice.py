"""Which KVM to run on, which version of the interface to speak with it, and why that one."""

from __future__ import annotations

from dataclasses import dataclass

from guestfault.dialect.published import DIALECTS, dialect_named
from guestfault.dialect.record import Dialect
from guestfault.errors import Unavailable
from guestfault.kvm.protocols import System
from guestfault.kvm.system import KvmSystem
from guestfault.softkvm.system import SoftSystem

__all__ = ["DEFAULT_DIALECT", "KVMS", "Choice", "choose"]

KVMS = ("auto", "soft", "kvm")
DEFAULT_DIALECT = "seed"


@dataclass(frozen=True, slots=True)
class Choice:
    """A KVM, and ``why`` it was taken: empty if it was asked for.

    ``dialect`` is what to speak with it; ``None`` leaves it to what the KVM announces.
    """

    system: System
    dialect: Dialect | None
    why: str = ""


def choose(kvm: str, dialect: str | None, npt: bool | None = None) -> Choice:
    """Open the KVM that was asked for; for ``auto`` the real one, if it is usable.

    ``dialect`` is the name of one.  The software KVM speaks any, and it is taken unless ``kvm`` is
    the real one: then the kernel must announce the dialect, as one does that was built with the
    series.  ``npt`` chooses two-dimensional paging or shadow page tables, and is the software KVM's
    to choose.  Raises :class:`~guestfault.errors.Unavailable` for a KVM or dialect that is not to
    be had.
    """
    spoken = None if dialect is None else dialect_named(dialect)
    if kvm == "kvm":
        if npt is not None:
            raise Unavailable(
                f"--npt {npt:d}",
                "/dev/kvm has it from its module's parameter (npt of kvm_amd, ept of kvm_intel)",
                "leave it out, or use --kvm soft",
            )
        return _real(spoken)
    if kvm == "soft" or spoken is not None or npt is not None:
        return _soft(spoken, npt=npt is not False)
    try:
        system = KvmSystem()
    except Unavailable as error:
        return _soft(None, f"no real KVM here ({error.what}: {error.why})")
    return Choice(system, None, "it is there and usable")


def _soft(dialect: Dialect | None, why: str = "", *, npt: bool = True) -> Choice:
    dialect = dialect or DIALECTS[DEFAULT_DIALECT]
    return Choice(SoftSystem(dialect, tdp_enabled=npt), dialect, why)


def _real(dialect: Dialect | None) -> Choice:
    system = KvmSystem()
    if dialect is not None:
        for cap in dialect.capabilities:
            if system.check_extension(cap.number) <= 0:
                system.close()
                raise Unavailable(
                    f"--dialect {dialect.name}",
                    f"the running kernel does not announce {cap.name} ({cap.number})",
                    "leave it out, or use --kvm soft",
                )
    return Choice(system, dialect)
