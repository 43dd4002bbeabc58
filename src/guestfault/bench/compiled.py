"""The engine that is compiled: the loop of :mod:`guestfault.paging.hot`, and its like for readers.

``Functions`` are the two of them; a benchmark gives those of a C program instead, which take the
same words, to see what numba costs.
"""

from __future__ import annotations

import ctypes
import errno
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

from guestfault.bench.experiment import ExperimentError, is_done
from guestfault.bench.machine import Machine, Share
from guestfault.bench.plain import PlainEngine, PlainRunner
from guestfault.errors import Unavailable
from guestfault.fault.locate.tracepoint import TracepointLocator, gpa_from
from guestfault.kvm.protocols import System
from guestfault.kvm.vcpu import KvmVcpu
from guestfault.linux.mapping import Mapping
from guestfault.memory.ram import PAGE_SIZE
from guestfault.paging import hot, hot_reader
from guestfault.paging import hot_words as at
from guestfault.paging.claims import SharedClaims
from guestfault.paging.histogram import BUCKETS, LatencyHistogram
from guestfault.paging.hot_loop import blank_words, describe_memory, describe_trace
from guestfault.uapi import kvm as uapi

__all__ = ["NUMBA", "CompiledEngine", "Functions"]

_MESSAGES_AT_ONCE = 16


@dataclass(frozen=True, slots=True)
class Functions:
    """The loop of a vCPU and that of a reader; both take a row of words and a histogram."""

    name: str
    run: Callable[[hot.Words, hot.Words], int]
    serve: Callable[[hot.Words, hot.Words], int]


NUMBA = Functions("compiled Python", hot.run, hot_reader.serve)


class CompiledEngine:
    """For vCPUs of ``/dev/kvm``.  ``timed`` times the system calls of the exit way.

    Raises :class:`~guestfault.errors.Unavailable` on another KVM.
    """

    def __init__(self, system: System, functions: Functions = NUMBA, *, timed: bool = False):
        self.name = functions.name
        self._system = system
        self._functions = functions
        self._timed = timed
        self._plain = PlainEngine(system, None, annotates=False)

    @contextmanager
    def runner(self, machine: Machine, share: Share) -> Iterator[_Runner]:
        """See :class:`~guestfault.bench.experiment.Engine`."""
        vcpu = share.vcpu
        if not isinstance(vcpu, KvmVcpu):
            raise Unavailable("the compiled loop", f"{self._system.name} is Python itself")
        words = _words(machine)
        words[at.KVM_RUN_AT] = ctypes.addressof(vcpu.kvm_run)
        words[at.UFFD] = share.uffd.fileno()
        words[at.TIMED] = self._timed
        filled = bytearray(machine.ram.pages)
        filled[: machine.layout.header_pages] = b"\1" * machine.layout.header_pages
        claims = SharedClaims(filled, ())  # the shares are apart, so the claims may be, too
        words[at.FILLED_AT], words[at.CLAIMS_AT] = claims.filled_at, claims.at
        with TracepointLocator(
            self._system, translate=gpa_from(vcpu), slots=machine.slots
        ) as locator:
            if describe_trace(words, locator):
                vcpu.kvm_run.kvm_valid_regs = uapi.KVM_SYNC_X86_SREGS
            python = PlainRunner(machine, share, None, locator)
            yield _Runner(vcpu, words, self._functions.run, python, claims)

    def reader(self, machine: Machine, uffd_index: int, stop_fd: int) -> _Reader:
        """See :class:`~guestfault.bench.experiment.Engine`."""
        words = _words(machine)
        words[at.UFFD], words[at.STOP_FD] = machine.uffds[uffd_index].fileno(), stop_fd
        # With a reader for each vCPU, who takes a second message keeps another from it.
        vcpus = machine.shape.vcpus // len(machine.uffds)
        words[at.MESSAGES] = _MESSAGES_AT_ONCE if machine.shape.readers < vcpus else 1
        return _Reader(words, self._functions.serve)


def _words(machine: Machine) -> hot.Words:
    words = blank_words(1)
    describe_memory(words, machine.ram, machine.slots)
    words[at.SOURCE] = at.SOURCE_NONE
    if machine.source is not None:
        words[at.SOURCE], words[at.SOURCE_AT] = at.SOURCE_MEMORY, machine.source.address
    return words


class _Runner:
    def __init__(
        self,
        vcpu: KvmVcpu,
        words: hot.Words,
        loop: Callable[[hot.Words, hot.Words], int],
        python: PlainRunner,
        claims: SharedClaims,
    ) -> None:
        self._vcpu = vcpu
        self._words = words
        self._loop = loop
        self._python = python
        self._claims = claims
        self._histogram = np.zeros(BUCKETS, np.int64)

    def run(self) -> None:
        while True:
            ret = self._vcpu.run_by(self._issue)
            if ret in (at.NOTHING, -errno.EINTR):
                continue
            if ret == 0 and is_done(self._vcpu):
                return
            self._python.resolve(ret)

    def _issue(self, fd: int) -> int:
        self._words[at.VCPU_FD] = fd
        return self._loop(self._words, self._histogram)

    @property
    def faults(self) -> int:
        return int(self._words[at.BARE] + self._words[at.ANNOTATED]) + self.in_python

    @property
    def in_python(self) -> int:
        return self._python.faults

    @property
    def outside_ns(self) -> float:
        words = self._words
        if not words[at.TIMED]:
            return 0.0
        return float(words[at.NS_ALL] - words[at.NS_RUN] - words[at.NS_LET_IN])

    @property
    def latency(self) -> LatencyHistogram:
        return LatencyHistogram.merge(
            [_histogram(self._words, self._histogram), self._python.latency]
        )


class _Reader:
    def __init__(self, words: hot.Words, loop: Callable[[hot.Words, hot.Words], int]) -> None:
        self._words = words
        self._loop = loop
        self._buffer = Mapping.anonymous(PAGE_SIZE)
        words[at.STAGING_AT] = self._buffer.address
        self._histogram = np.zeros(BUCKETS, np.int64)

    def serve(self) -> None:
        result = self._loop(self._words, self._histogram)
        self._buffer.close()
        if result:
            raise ExperimentError(f"a reader ended with {result}")

    @property
    def faults(self) -> int:
        return int(self._words[at.SERVED])

    @property
    def latency(self) -> LatencyHistogram:
        return _histogram(self._words, self._histogram)


def _histogram(words: hot.Words, counts: hot.Words) -> LatencyHistogram:
    histogram = LatencyHistogram()
    histogram.add(counts.tolist(), int(words[at.LATENCY_TOTAL]), int(words[at.LATENCY_MAX]))
    return histogram
