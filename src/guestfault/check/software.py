"""The software KVM's own parts: the processor it emulates with, and the decoder beside it.

Importing them is not enough: unicorn loads a shared library of its own, whose absence shows at the
first use only.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from importlib.metadata import version

from guestfault.check.finding import Finding, Status, Use

__all__ = ["probe"]

NOP = b"\x90"


def probe() -> tuple[Finding, ...]:
    """Emulate one instruction with unicorn, and decode one with iced-x86."""
    return (
        _finding("unicorn", "emulates x86-64", _emulate),
        _finding("iced-x86", "decodes x86-64", _decode),
    )


def _finding(package: str, does: str, use: Callable[[], object]) -> Finding:
    try:
        use()
        detail = f"{version(package)} {does}"
    # Whatever comes up (ImportError, OSError, UcError), it means that it does not work here.
    except Exception as error:
        detail = f"does not work: {type(error).__name__}: {error}"
        mend = f"install it again: pip install --force-reinstall {package}"
        return Finding(package, Status.MISSING, detail, mend, (Use.SOFTWARE_KVM,))
    return Finding(package, Status.OK, detail, needed_for=(Use.SOFTWARE_KVM,))


def _emulate() -> None:
    unicorn = import_module("unicorn")
    emulator = unicorn.Uc(unicorn.UC_ARCH_X86, unicorn.UC_MODE_64)
    emulator.mem_map(0x1000, 0x1000)
    emulator.mem_write(0x1000, NOP)
    emulator.emu_start(0x1000, 0x1000 + len(NOP))


def _decode() -> None:
    iced_x86 = import_module("iced_x86")
    iced_x86.Decoder(64, NOP).decode()
