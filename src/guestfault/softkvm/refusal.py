"""Why a guest access did not go through: what the MMU tells the run loop.

The processor's TLB miss handler can only say yes or no; the reason waits here until the processor
has stopped.  Code that accesses memory on the guest's behalf raises it as :class:`AccessFailed`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from guestfault.x86.paging import AccessKind

__all__ = ["AccessFailed", "Emulate", "Exit", "GuestException", "Refusal", "Retry"]


@dataclass(frozen=True, slots=True)
class Exit:
    """Leave KVM_RUN with this result: 0 with ``kvm_run`` filled, or a negative errno."""

    result: int


@dataclass(frozen=True, slots=True)
class Emulate:
    """The access is not to memory, or must not be done to it: KVM performs the instruction.

    ``error_code`` and ``address`` are what the processor reported of its fault, the address a
    linear one under shadow paging.
    """

    gpa: int
    kind: AccessKind
    error_code: int = field(default=0, compare=False)
    address: int = field(default=0, compare=False)


@dataclass(frozen=True, slots=True)
class Retry:
    """Nothing is wrong; a request must be served before the guest goes on."""


@dataclass(frozen=True, slots=True)
class GuestException:
    """The guest gets an exception; ``address`` goes to CR2.

    For INT n ``instruction_length`` is that of the instruction: the handler returns behind it, and
    the gate must be one that the guest may use by itself.
    """

    vector: int
    error_code: int | None = None
    address: int | None = None
    instruction_length: int = 0


Refusal = Exit | Emulate | Retry | GuestException


class AccessFailed(Exception):
    """An access by KVM itself on the guest's behalf did not succeed, for this reason."""

    def __init__(self, refusal: Refusal) -> None:
        self.refusal = refusal
        super().__init__(refusal)
