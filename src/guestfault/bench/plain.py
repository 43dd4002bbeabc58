"""The engine in plain Python: what runs on the software KVM, and where numba is not installed."""

from __future__ import annotations

import errno
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from guestfault.bench.experiment import ExperimentError, run_until_done
from guestfault.bench.machine import Machine, Share
from guestfault.dialect.interface import MemoryFaultInterface
from guestfault.fault.locate.tracepoint import TracepointLocator, gpa_from
from guestfault.fault.outcome import BareFault, MemoryFault, outcome
from guestfault.guest.layout import PAGE_SIZE
from guestfault.kvm.protocols import System
from guestfault.linux.readable import readable
from guestfault.linux.userfaultfd import PageFault, Userfaultfd
from guestfault.paging.histogram import LatencyHistogram

__all__ = ["PlainEngine", "bring_in"]


def bring_in(machine: Machine, uffd: Userfaultfd, address: int) -> None:
    """Let the page of an address in the guest view in, and wake who sleeps in it.

    Raises :class:`~guestfault.bench.experiment.ExperimentError` if the kernel will not.
    """
    page = address & -PAGE_SIZE
    while True:
        if machine.source is None:
            progress = uffd.continue_(page, PAGE_SIZE)
        else:
            source = machine.source.address + page - machine.ram.guest.address
            progress = uffd.copy(page, source, PAGE_SIZE)
        match progress.errno:
            case 0:
                return
            case errno.EEXIST:
                uffd.wake(page, PAGE_SIZE)
                return
            case errno.EAGAIN:
                continue
            case failed:
                raise ExperimentError(f"the page at {page:#x} cannot be let in: errno {failed}")


class PlainEngine:
    """``interface`` is how the KVM annotates; unless it ``annotates`` the tracepoints do."""

    name = "plain Python"

    def __init__(
        self, system: System, interface: MemoryFaultInterface | None, *, annotates: bool
    ) -> None:
        self._system = system
        self._interface = interface
        self._annotates = annotates

    @contextmanager
    def runner(self, machine: Machine, share: Share) -> Iterator[PlainRunner]:
        """See :class:`~guestfault.bench.experiment.Engine`."""
        with ExitStack() as stack:
            locator = None
            if not self._annotates:
                translate = gpa_from(share.vcpu)
                locator = stack.enter_context(
                    TracepointLocator(self._system, translate=translate, slots=machine.slots)
                )
            yield PlainRunner(machine, share, self._interface, locator)

    def reader(self, machine: Machine, uffd_index: int, stop_fd: int) -> PlainReader:
        """See :class:`~guestfault.bench.experiment.Engine`."""
        return PlainReader(machine, machine.uffds[uffd_index], stop_fd)


class PlainRunner:
    """The vCPU of a share, its failed accesses resolved in Python."""

    in_python = 0
    outside_ns = 0.0

    def __init__(
        self,
        machine: Machine,
        share: Share,
        interface: MemoryFaultInterface | None,
        locator: TracepointLocator | None,
    ) -> None:
        self._machine = machine
        self._share = share
        self._interface = interface
        self._locator = locator
        self.faults = 0
        self.latency = LatencyHistogram()

    def run(self) -> None:
        """See :class:`~guestfault.bench.experiment.VcpuRunner`."""
        run_until_done(self._share.vcpu, self.resolve)

    def resolve(self, ret: int) -> None:
        """Bring in what a result of KVM_RUN was for want of."""
        began = time.perf_counter_ns()
        slots = self._machine.slots
        match outcome(ret, self._share.vcpu.kvm_run, self._interface):
            case MemoryFault(gpa):
                hva = slots.gpa_to_hva(gpa)
            case BareFault():
                hva = self._locate()
            case other:
                raise ExperimentError(f"KVM_RUN ended with {other}")
        if hva is None:
            raise ExperimentError("an access failed, and nobody knows which")
        bring_in(self._machine, self._share.uffd, hva)
        self.faults += 1
        self.latency.record(time.perf_counter_ns() - began)

    def _locate(self) -> int | None:
        access = self._locator.locate() if self._locator is not None else None
        return None if access is None else access.hva


class PlainReader:
    """A userfaultfd's reader."""

    def __init__(self, machine: Machine, uffd: Userfaultfd, stop_fd: int) -> None:
        self._machine = machine
        self._uffd = uffd
        self._stop_fd = stop_fd
        self.faults = 0
        self.latency = LatencyHistogram()

    def serve(self) -> None:
        """See :class:`~guestfault.bench.experiment.Reader`."""
        for _ in readable(self._uffd.fileno(), self._stop_fd):
            began = time.perf_counter_ns()
            for event in self._uffd.read_events():
                if isinstance(event, PageFault):
                    bring_in(self._machine, self._uffd, event.address)
                    self.faults += 1
                    self.latency.record(time.perf_counter_ns() - began)
