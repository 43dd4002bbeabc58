"""Stops on instructions that the processor must not run alone: it would not ask anybody.

Unicorn runs IN and OUT, INS and OUTS without an intercept and goes on inside the block; it skips
SYSCALL and SYSENTER; and SWAPGS changes a register that cannot be read back.  So each block is
looked through when it has been translated and before it runs.  If such an instruction is in it, a
hook is planted on its address and the block is thrown away: it will be translated again, with a
call to the hook.

A hook knows a linear address and no more.  Another instruction may be there by now, after a write
or in another address space; whoever is stopped by mistake calls :meth:`Planted.remove`.
"""

from __future__ import annotations

import re
from collections.abc import Callable

import iced_x86

from guestfault.softkvm.engine import Engine

__all__ = ["Planted"]

# Bytes that one of the instructions must contain; a block without them is clean.
_SUSPECT = re.compile(rb"[\x6c-\x6f\xe4-\xe7\xec-\xef]|\x0f(?:[\x05\x34]|\x01\xf8)")
_INSTRUCTIONS = frozenset(
    getattr(iced_x86.Mnemonic, name)
    for name in (
        *("IN", "OUT", "INSB", "INSW", "INSD", "OUTSB", "OUTSW", "OUTSD"),
        *("SYSCALL", "SYSENTER", "SWAPGS"),
    )
)
_MAX = 4096
"""Of hooks.  A guest that generates code could have any number; then all are planted afresh."""


class Planted:
    """The stops of one processor.  ``on_reached`` is called, in the middle of a run, at one."""

    def __init__(self, engine: Engine, on_reached: Callable[[], None]) -> None:
        self._engine = engine
        self._on_reached = on_reached
        self._hooks: dict[int, int] = {}
        self._wanted: set[int] = set()

    def look_through(self, code: bytes, address: int, code_size: Callable[[], int]) -> bool:
        """Whether the block has instructions that need a stop and have none.

        ``code_size`` gives 16, 32 or 64, and is asked only if the block is suspect.
        """
        if _SUSPECT.search(code):
            decoder = iced_x86.Decoder(code_size(), code, ip=address)
            self._wanted.update(
                i.ip for i in decoder if i.mnemonic in _INSTRUCTIONS and i.ip not in self._hooks
            )
        return bool(self._wanted)

    def plant(self) -> None:
        """Plant the stops that were found wanting; outside a run."""
        wanted, self._wanted = self._wanted, set()
        if len(self._hooks) + len(wanted) > _MAX:
            for address in list(self._hooks):
                self.remove(address)
        for address in wanted:
            self._hooks[address] = self._engine.hook_instruction(address, self._on_reached)
        self._engine.flush_code()

    def remove(self, address: int) -> None:
        """Let the instruction there run, if there is a stop on it; outside a run."""
        hook = self._hooks.pop(address, None)
        if hook is not None:
            self._engine.unhook(hook)
            self._engine.flush_code()
