"""What is measured: the shape of an experiment, and what came of one run of it."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from guestfault.guest.layout import PAGE_SIZE
from guestfault.paging.histogram import LatencyHistogram
from guestfault.scale.published import Layout as Uffds

__all__ = ["Fault", "Run", "Shape", "Uffds", "Way"]


class Way(StrEnum):
    """Who brings an absent page in."""

    EXIT = "exit"
    UFFD = "uffd"


class Fault(StrEnum):
    """Where a page's bytes are when it is missed."""

    MINOR = "minor"  # in the page cache: UFFDIO_CONTINUE maps them
    MISSING = "missing"  # in other memory: UFFDIO_COPY


@dataclass(frozen=True, slots=True)
class Shape:
    """One experiment: so many vCPUs, each with so many pages of its own.

    ``readers`` are the threads that read each userfaultfd, in the way that has any.
    """

    way: Way
    vcpus: int
    pages: int
    fault: Fault = Fault.MINOR
    uffds: Uffds = Uffds.SHARED
    readers: int = 1

    @property
    def size(self) -> int:
        """Bytes of all vCPUs' pages."""
        return self.vcpus * self.pages * PAGE_SIZE


@dataclass(frozen=True, slots=True)
class Run:
    """One run.  ``seconds`` from the start of all vCPUs to the end of the last.

    ``each`` is every vCPU's own time, ``cpu_seconds`` the whole process's, its guests' included.
    ``elsewhere`` is the part of the machine's processors that other processes had meanwhile.
    ``faults`` are those resolved; ``in_python`` those of them that the compiled loop handed back.
    ``latency``: nanoseconds from the exit, or from the reading of the event, to the page being in.
    """

    shape: Shape
    seconds: float
    each: tuple[float, ...]
    cpu_seconds: float
    elsewhere: float
    faults: int
    in_python: int
    latency: LatencyHistogram
    outside_ns: float | None = None
    """Per fault, what the loop took besides KVM_RUN and userfaultfd's ioctls; if it was timed."""

    @property
    def rate(self) -> float:
        """The whole VM's pages per second."""
        return self.shape.vcpus * self.shape.pages / self.seconds

    @property
    def rate_per_vcpu(self) -> float:
        """The mean over the vCPUs of each one's own pages per second."""
        return sum(self.shape.pages / s for s in self.each) / len(self.each)

    @property
    def cpu_per_million(self) -> float:
        """CPU seconds per million pages."""
        return self.cpu_seconds / (self.shape.vcpus * self.shape.pages) * 1e6
