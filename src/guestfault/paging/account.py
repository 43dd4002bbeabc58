"""What the faults of one vCPU were and what they cost."""

from __future__ import annotations

from dataclasses import dataclass, field

from guestfault.paging.histogram import LatencyHistogram

__all__ = ["FaultAccount"]


@dataclass(slots=True)
class FaultAccount:
    """Counts by the shape in which the fault arrived.  Written by one thread.

    ``annotated``: KVM_EXIT_MEMORY_FAULT.  ``bare``: an errno and nothing else; of these,
    ``by_tracepoint`` and ``by_decode`` are those that were named so, ``unsure`` those for which
    more than one access was in question.  ``ram_mmio``: KVM_EXIT_MMIO on RAM.  ``fetches``:
    KVM_EXIT_INTERNAL_ERROR, because KVM's emulator could not fetch.  ``silent``: no exit at all,
    found by the watchdog.  ``userfault``: an event of a userfaultfd.  ``again``: of all
    these, those whose page was in already when they were looked at, because another vCPU had asked
    for it too.  ``latency``: nanoseconds from the exit (or event) to the page being in.
    """

    annotated: int = 0
    bare: int = 0
    by_tracepoint: int = 0
    by_decode: int = 0
    unsure: int = 0
    ram_mmio: int = 0
    fetches: int = 0
    silent: int = 0
    userfault: int = 0
    again: int = 0
    latency: LatencyHistogram = field(default_factory=LatencyHistogram)

    @property
    def faults(self) -> int:
        """All of them."""
        return sum(
            (self.annotated, self.bare, self.ram_mmio, self.fetches, self.silent, self.userfault)
        )
