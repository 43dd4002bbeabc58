"""One run of an experiment: all vCPUs start together, and each is timed to its end.

Both ways are run by an :class:`Engine`, which is compiled or is not, but never compiled for the one
and not for the other.  The vCPUs' threads, the readers' threads and this one are all there are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import NamedTuple, Protocol, TypeAlias

from guestfault.bench.machine import Machine, Share
from guestfault.bench.shape import Run, Shape, Way
from guestfault.errors import GuestfaultError
from guestfault.guest.program import DONE_PORT
from guestfault.kvm.protocols import System, Vcpu
from guestfault.paging.histogram import LatencyHistogram
from guestfault.uapi import kvm as uapi


class Span(NamedTuple):
    """When one vCPU began and ended, and the process's CPU seconds by then."""

    began: float
    end: float
    cpu: float


_Body: TypeAlias = Callable[[threading.Barrier], Span]

__all__ = ["Engine", "ExperimentError", "Reader", "VcpuRunner", "run_once", "run_until_done"]


class ExperimentError(GuestfaultError):
    """A run came to something else than its end, so it measured nothing."""


class VcpuRunner(Protocol):
    """Runs one vCPU of the exit way, on one thread."""

    @property
    def faults(self) -> int:
        """How many it has resolved."""

    @property
    def in_python(self) -> int:
        """How many of them in Python, though the engine is compiled."""

    @property
    def outside_ns(self) -> float:
        """Nanoseconds besides the system calls', if it is timed."""

    @property
    def latency(self) -> LatencyHistogram:
        """From the failure being known to the page being in."""

    def run(self) -> None:
        """Until the guest is done."""


class Reader(Protocol):
    """Serves one userfaultfd, on one thread."""

    @property
    def faults(self) -> int:
        """How many it has resolved."""

    @property
    def latency(self) -> LatencyHistogram:
        """From the failure being known to the page being in."""

    def serve(self) -> None:
        """Until ``stop_fd`` is readable."""


class Engine(Protocol):
    """Who does the work of both ways."""

    @property
    def name(self) -> str:
        """For people."""

    def runner(self, machine: Machine, share: Share) -> AbstractContextManager[VcpuRunner]:
        """For a vCPU of the exit way; entered on the thread that will run it."""

    def reader(self, machine: Machine, uffd_index: int, stop_fd: int) -> Reader:
        """For one of the readers of a userfaultfd."""


def run_once(system: System, shape: Shape, engine: Engine) -> Run:
    """Make a VM, run it, and see that every page is as it must be.

    Raises :class:`ExperimentError` for a run that ended otherwise, and what :class:`Machine` does.
    """
    with Machine(system, shape) as machine:
        run = _exit_way if shape.way is Way.EXIT else _uffd_way
        result = run(machine, engine)
        if wrong := machine.wrong_pages():
            raise ExperimentError(f"{wrong} pages do not hold what was written to them")
        return result


def run_until_done(vcpu: Vcpu, unknown: Callable[[int], None]) -> None:
    """KVM_RUN until the guest says that it is done; ``unknown`` gets every other result."""
    while True:
        ret = vcpu.run()
        if ret == 0 and is_done(vcpu):
            return
        if ret != -errno.EINTR:
            unknown(ret)


def is_done(vcpu: Vcpu) -> bool:
    """Whether the last exit is the guest's last word."""
    run = vcpu.kvm_run
    return bool(run.exit_reason == uapi.KVM_EXIT_IO and run.io.port == DONE_PORT)


def _exit_way(machine: Machine, engine: Engine) -> Run:
    runners: list[VcpuRunner] = []

    def body(share: Share) -> _Body:
        def run(start: threading.Barrier) -> Span:
            with engine.runner(machine, share) as runner:
                runners.append(runner)
                return _timed(start, runner.run)

        return run

    clock = _together([body(share) for share in machine.shares])
    faults = sum(runner.faults for runner in runners)
    outside = sum(runner.outside_ns for runner in runners)
    return Run(
        machine.shape,
        clock.seconds,
        clock.each,
        clock.cpu,
        clock.elsewhere,
        faults,
        sum(runner.in_python for runner in runners),
        LatencyHistogram.merge(runner.latency for runner in runners),
        outside / faults if outside else None,
    )


def _uffd_way(machine: Machine, engine: Engine) -> Run:
    stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
    try:
        readers = [
            engine.reader(machine, n, stop_fd)
            for n in range(len(machine.uffds))
            for _ in range(machine.shape.readers)
        ]
        threads = [threading.Thread(target=reader.serve, daemon=True) for reader in readers]
        for thread in threads:
            thread.start()

        def body(share: Share) -> _Body:
            def unknown(ret: int) -> None:
                reason = share.vcpu.kvm_run.exit_reason
                raise ExperimentError(f"KVM_RUN ended with {ret}, exit reason {reason}")

            return lambda start: _timed(start, lambda: run_until_done(share.vcpu, unknown))

        try:
            clock = _together([body(share) for share in machine.shares])
        finally:
            os.eventfd_write(stop_fd, 1)
            for thread in threads:
                thread.join()
    finally:
        os.close(stop_fd)
    faults = sum(reader.faults for reader in readers)
    latency = LatencyHistogram.merge(reader.latency for reader in readers)
    return Run(
        machine.shape, clock.seconds, clock.each, clock.cpu, clock.elsewhere, faults, 0, latency
    )


def _timed(start: threading.Barrier, run: Callable[[], None]) -> Span:
    """From when to when it ran; what comes before and after is not the experiment's."""
    start.wait()
    began = time.perf_counter()
    run()
    return Span(began, time.perf_counter(), time.process_time())


def _together(
    bodies: list[_Body],
) -> _Times:
    """Run all, from one moment on."""
    start = threading.Barrier(len(bodies) + 1)
    spans = [Span(0.0, 0.0, 0.0)] * len(bodies)
    errors: list[Exception] = []

    def run(n: int) -> None:
        try:
            spans[n] = bodies[n](start)
        except threading.BrokenBarrierError:
            pass
        except Exception as error:
            errors.append(error)
            start.abort()

    threads = [threading.Thread(target=run, args=(n,)) for n in range(len(bodies))]
    for thread in threads:
        thread.start()
    # Before the start: this thread may be the last to wake.
    began, cpu, busy = time.perf_counter(), time.process_time(), _busy()
    with contextlib.suppress(threading.BrokenBarrierError):
        start.wait()
    for thread in threads:
        thread.join()
    wall, all_cpu, busy = time.perf_counter() - began, time.process_time() - cpu, _busy() - busy
    if errors:
        raise errors[0]
    elsewhere = max(0.0, busy - all_cpu) / wall / (os.cpu_count() or 1)
    return _Times(
        tuple(span.end - span.began for span in spans),
        max(span.end for span in spans) - min(span.began for span in spans),
        max(span.cpu for span in spans) - cpu,
        elsewhere,
    )


class _Times(NamedTuple):
    each: tuple[float, ...]
    seconds: float
    cpu: float
    elsewhere: float


def _busy() -> float:
    """CPU seconds that anybody has had, the host's other guests (steal) included; see proc(5)."""
    with open("/proc/stat") as file:
        user, nice, system, _idle, _iowait, *interrupts = map(int, file.readline().split()[1:9])
    return float(user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
