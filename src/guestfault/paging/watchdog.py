"""The fault that never comes back: a vCPU that stands still inside KVM_RUN.

An asynchronous page fault that fails is tried again each time, without an exit: the worker
drops its result, the vCPU runs, faults, and queues the work anew (``kvm_setup_async_pf`` and
``async_pf_execute``, virt/kvm/async_pf.c).  Nothing returns, so there is nothing to classify.  From
outside it looks like any long computation, except that RIP does not move.

The watchdog makes KVM_RUN return: a vCPU that has not left it for ``patience`` seconds is kicked,
and its RIP looked at.  Standing on one instruction several times in a row is not wrong (``jmp .``
does so); it is when the host cannot serve something that this instruction accesses.  That question
is the decode locator's; this module only says when to ask it.
"""

from __future__ import annotations

__all__ = ["Watchdog"]


class Watchdog:
    """Watches one vCPU.  :meth:`overdue` is for the watching thread, the rest for the vCPU's own.

    ``patience`` in seconds; ``looks`` is how many times in a row RIP must be the same.
    """

    def __init__(self, patience: float = 0.5, looks: int = 3) -> None:
        self._patience = patience
        self._looks = looks
        self._entries = 0
        self._inside = False
        self._seen: tuple[int, float] = (0, 0.0)
        self._rip: int | None = None
        self._same = 0
        self._kicked = False

    def entering(self) -> None:
        """KVM_RUN is about to be called."""
        self._entries += 1
        self._inside = True

    def left(self) -> None:
        """KVM_RUN has returned."""
        self._inside = False

    def overdue(self, now: float) -> bool:
        """Whether the vCPU has been in one KVM_RUN for too long at ``now`` and must be kicked."""
        entries, since = self._seen
        if not self._inside or self._entries != entries:
            self._seen = self._entries, now
            return False
        if now - since < self._patience:
            return False
        self._seen = entries, now
        self._kicked = True
        return True

    def stands_still(self, rip: int) -> bool:
        """After a KVM_RUN that was interrupted: whether RIP has not moved over several looks."""
        if not self._kicked:
            return False
        self._kicked = False
        self._same = self._same + 1 if rip == self._rip else 1
        self._rip = rip
        return self._same >= self._looks

    def progress(self) -> None:
        """The vCPU left KVM_RUN with an exit of its own."""
        self._rip, self._same = None, 0
