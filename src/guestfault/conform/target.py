"""Which KVM is asked: ``soft:linux-7.3,npt=0``, ``kvm``, ``lab:6.18,npt=0``, ``lab:6.18,ept=1``.

``soft`` is the software KVM in one dialect, ``kvm`` this machine's, ``lab`` that of a kernel which
is started for it (by who runs the command: this room knows no lab).  ``npt=0`` asks for shadow page
tables, where there is a choice.  In a lab it is a parameter of ``kvm_amd``, which is there unless
said otherwise; to name ``kvm_intel``'s, ``ept=1`` or ``ept=0``, is to ask for that one.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from guestfault.dialect.published import dialect_named
from guestfault.errors import GuestfaultError
from guestfault.kvm.protocols import System
from guestfault.kvm.system import KvmSystem
from guestfault.softkvm.system import SoftSystem

__all__ = ["Target", "about", "open_system", "parse"]

_DEFAULT_DIALECT = "linux-7.3"
_FORM = "soft[:DIALECT][,npt=0], kvm, or lab:KERNEL[,npt=0|,ept=1|,ept=0]"
_MODULES = Path("/sys/module")
# The modules that drive a processor, and which parameter says that it walks two tables at once.
_VENDORS = {"kvm_amd": "npt", "kvm_intel": "ept", "kvm_pvm": ""}


@dataclass(frozen=True)
class Target:
    """``kind`` is ``soft``, ``kvm`` or ``lab``, ``which`` its dialect or its kernel.

    ``npt`` is whether it has nested page tables, by either vendor's name, and ``intel`` whether it
    is ``kvm_intel`` in a lab.
    """

    kind: str
    which: str = ""
    npt: bool = True
    intel: bool = False

    @property
    def name(self) -> str:
        """As it is written, in full."""
        name = f"{self.kind}:{self.which}" if self.which else self.kind
        if self.intel:
            return f"{name},ept={int(self.npt)}"
        return name if self.npt else f"{name},npt=0"


def parse(text: str) -> Target:
    """Raises :class:`~guestfault.errors.GuestfaultError` for a word of another form."""
    match = re.fullmatch(r"(soft|kvm|lab)(?::([^,]+))?(?:,(npt|ept)=([01]))?", text)
    if match is None or (match[1] == "lab") > bool(match[2]):
        raise GuestfaultError(f"{text!r} names no KVM: say {_FORM}")
    kind, which, intel, npt = match[1], match[2] or "", match[3] == "ept", match[4] != "0"
    if kind == "kvm" and (which or match[3]):
        raise GuestfaultError(f"{text!r}: this machine's KVM is as it was loaded: say kvm")
    if kind == "soft" and intel:
        raise GuestfaultError(f"{text!r}: the software KVM is of no vendor: say npt")
    if kind == "soft":
        which = dialect_named(which or _DEFAULT_DIALECT).name
    return Target(kind, which, npt, intel)


def open_system(target: Target) -> System:
    """The KVM of a target here, not in a lab.

    Raises :class:`~guestfault.errors.Unavailable` if there is none.
    """
    if target.kind == "soft":
        return SoftSystem(target.which, tdp_enabled=target.npt)
    assert target.kind == "kvm"
    return KvmSystem()


def about(target: Target) -> dict[str, str]:
    """What is known of it: the ``kernel``'s release, the ``module`` and its ``tdp``."""
    if target.kind == "soft":
        return {"dialect": target.which, "tdp": "yes" if target.npt else "no"}
    facts = {"kernel": os.uname().release}
    for module, parameter in _VENDORS.items():
        directory = _MODULES / module
        if directory.is_dir():
            facts["module"] = module
            facts["tdp"] = _tdp(directory, parameter)
            break
    return facts


def _tdp(directory: Path, parameter: str) -> str:
    try:
        value = (directory / "parameters" / parameter).read_text().strip()
    except OSError:
        return "no"
    return "yes" if value in ("Y", "1") else "no"
