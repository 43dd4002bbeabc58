"""What a case came to, as data that goes to JSON and back.

A :class:`Result` holds :class:`Phase` after phase, a phase the :class:`Exit` of each ``KVM_RUN``.
No field depends on where the host has put something or on how long it took, so that the same kernel
gives the same result twice, and two results can be compared field by field.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

__all__ = ["SKIPPED", "Exit", "Phase", "Result"]

SKIPPED = "skipped"
"""The word of a case that did not run."""


@dataclass
class Exit:
    """One ``KVM_RUN``.

    ``ret`` is 0 or a negative errno, which has a name in ``errno``.  ``exit_reason`` is ``None`` if
    it was not written.  ``word`` is what the table says of it, ``payload`` what
    :func:`~guestfault.fault.outcome.outcome` read, ``union`` the changed bytes of the exit's union
    as (offset, hexadecimal), ``rip`` a place such as ``access``.
    """

    ret: int
    errno: str
    exit_reason: int | None
    word: str
    payload: dict[str, Any]
    union: list[list[Any]]
    rip: str


@dataclass
class Phase:
    """A part of a case, by its ``name``.

    ``access``
        the guest comes to its access;
    ``kick``
        it slept there, and was kicked: what ``KVM_RUN`` returned;
    ``again``
        ``KVM_RUN`` once more, with nothing mended;
    ``mended``
        the condition is no more, and the guest runs on.

    ``blocked`` tells where it slept, if it did: what the userfaultfd said, or the thread's state.
    """

    name: str
    exits: list[Exit] = field(default_factory=list)
    blocked: dict[str, Any] | None = None


@dataclass
class Result:
    """A case on a KVM.

    ``word`` is the cell of the table.  ``ending`` tells whether the guest ended well: ``right``;
    ``wrong`` (it saw, or left in memory, what should not be there); or ``never``.  ``value`` is
    what it reported, ``memory`` the operand as it is at the end, both hexadecimal.  ``why`` is why
    it was skipped.  ``signals`` came with it.
    """

    case: str
    word: str
    phases: list[Phase] = field(default_factory=list)
    ending: str = ""
    value: str = ""
    memory: str = ""
    why: str = ""
    signals: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """An object with the fields' names; empty ones are left out."""
        return {key: value for key, value in asdict(self).items() if value not in ("", [])}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Result:
        """The reverse.  Raises :class:`TypeError` or :class:`KeyError` for anything else."""
        phases = [
            Phase(phase["name"], [Exit(**exit_) for exit_ in phase["exits"]], phase["blocked"])
            for phase in value.get("phases", [])
        ]
        return cls(**{**value, "phases": phases})
