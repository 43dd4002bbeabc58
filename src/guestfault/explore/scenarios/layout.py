"""Where things are in the scenarios' guests, and the plainest of their machines."""

from __future__ import annotations

from guestfault.dialect.record import Dialect
from guestfault.explore.scripted_cpu import Insn
from guestfault.explore.world import HVA, Machine

__all__ = ["DEVICE", "OLD", "OLD_VALUE", "PAGES", "A", "B", "Script", "plain"]

A, B = 0x2000, 0x3000
"""Two pages of data, behind the page of code."""
DEVICE = 0x8000
"""No slot is here."""
PAGES = 4
OLD = b"old!"
OLD_VALUE = int.from_bytes(OLD, "little")

Script = tuple[Insn, ...]


def plain(dialect: Dialect, *scripts: Script) -> Machine:
    """One slot with everything in it, an ordinary one, and a vCPU for each script."""
    machine = Machine(dialect, PAGES)
    machine.slot(0, 0, PAGES, HVA)
    for script in scripts:
        machine.vcpu(*script)
    machine.prefault()
    return machine
