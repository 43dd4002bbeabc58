"""The ports on which the built-in guests report: begun, result, done."""

from __future__ import annotations

import time
from dataclasses import dataclass

from guestfault.guest.program import DONE_PORT, READY_PORT, RESULT_PORT

__all__ = ["GuestConsole"]


@dataclass(slots=True)
class GuestConsole:
    """What one vCPU of a built-in guest has said.  Times are ``time.monotonic()`` seconds."""

    first_instruction: float | None = None
    done: bool = False
    _halves: tuple[int, ...] = ()

    @property
    def checksum(self) -> int | None:
        """The result, once both halves of it have come."""
        if len(self._halves) < 2:
            return None
        return self._halves[0] | self._halves[1] << 32

    def wrote(self, port: int, data: bytes) -> bool:
        """The guest wrote to a port; whether that port is one of ours."""
        match port:
            case _ if port == READY_PORT:
                if self.first_instruction is None:
                    self.first_instruction = time.monotonic()
            case _ if port == RESULT_PORT:
                self._halves = (*self._halves[-1:], int.from_bytes(data, "little"))
            case _ if port == DONE_PORT:
                self.done = True
            case _:
                return False
        return True
