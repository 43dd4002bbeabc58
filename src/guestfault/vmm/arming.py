"""When the tracepoints are worth listening to.

They name a failed access several times as cheaply as decoding the instruction does
(``docs/locating.md``), but to listen costs something first: a ring, and once in a process a guest
that finds out what this host's records mean.
So the first bare faults of a vCPU are decoded, and only one that keeps having them gets
tracepoints. Where they are not to be had, every fault is decoded.
"""

from __future__ import annotations

from guestfault.errors import GuestfaultError
from guestfault.fault.locate.chain import Locators
from guestfault.fault.locate.tracepoint import TracepointLocator, gpa_from
from guestfault.kvm.protocols import System, Vcpu
from guestfault.memory.slots import SlotMap

__all__ = ["TracepointArming"]

WORTH_IT = 64
"""Bare faults after which a vCPU is listened to."""


class TracepointArming:
    """Arms the tracepoints of one vCPU's thread, once it has had enough bare faults."""

    def __init__(self, system: System, vcpu: Vcpu, slots: SlotMap, locators: Locators) -> None:
        self._system = system
        self._vcpu = vcpu
        self._slots = slots
        self._locators = locators
        self._bare = 0
        self._armed: TracepointLocator | None = None

    def bare_fault(self) -> None:
        """One more, on the vCPU's own thread."""
        self._bare += 1
        if self._bare != WORTH_IT:
            return
        try:
            translate = gpa_from(self._vcpu)
            self._armed = TracepointLocator(self._system, translate=translate, slots=self._slots)
        except GuestfaultError:
            return  # every fault is decoded then
        self._locators.tracepoint = self._armed.locate

    def locator(self) -> TracepointLocator | None:
        """The thread's locator, while it is listened to."""
        return self._armed

    def disarm(self) -> None:
        """The thread ends: its tracepoints end with it, and the next thread may have its own."""
        self._bare = 0
        self._locators.tracepoint = None
        if self._armed is not None:
            self._armed.close()
            self._armed = None
