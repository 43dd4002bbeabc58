"""The account of a run: what was asked, what it took, and whether the guest's results are right."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from guestfault.paging.histogram import LatencyHistogram
from guestfault.vmm.session import Session

__all__ = ["Latency", "Report", "VcpuReport", "report"]


@dataclass(frozen=True, slots=True)
class Latency:
    """From the fault to the page being in, in nanoseconds."""

    p50: int
    p90: int
    p99: int
    max: int

    @classmethod
    def of(cls, histogram: LatencyHistogram) -> Latency:
        """The usual figures of a histogram."""
        p50, p90, p99 = (histogram.percentile(p) for p in (50, 90, 99))
        return cls(p50, p90, p99, histogram.max)


@dataclass(frozen=True, slots=True)
class VcpuReport:
    """One vCPU: its faults by shape, its result, and where it stands if it is not done."""

    vcpu: int
    annotated: int
    bare: int
    by_tracepoint: int
    by_decode: int
    unsure: int
    fetches: int
    silent: int
    ram_mmio: int
    again: int
    done: bool
    rip: int
    checksum: int | None
    expected: int | None


@dataclass(frozen=True, slots=True)
class Report:
    """A run, finished or not.  Times in seconds, sizes in bytes, pages of 4096 bytes."""

    kvm: str
    mode: str
    absent: str
    guest: str
    memory: int
    pages: int
    pages_in: int
    eager_pages: int
    userfaults: int
    first_instruction: float | None
    seconds: float
    latency: Latency
    vcpus: tuple[VcpuReport, ...]
    memory_right: bool | None
    verdict: str
    failure: str | None

    @property
    def right(self) -> bool:
        """The guest is done and every result that can be checked is right."""
        return self.verdict in ("right", "done")

    def as_json(self) -> dict[str, Any]:
        """Plain data, for machines."""
        return asdict(self)


def report(session: Session, seconds: float) -> Report:
    """Account for a session that is not running.  ``seconds`` is how long it took in all."""
    guest = session.snapshot.guest
    done = all(loop.console.done for loop in session.vcpus)
    vcpus = []
    for i, loop in enumerate(session.vcpus):
        account = loop.resolver.account
        vcpus.append(
            VcpuReport(
                vcpu=i,
                annotated=account.annotated,
                bare=account.bare,
                by_tracepoint=account.by_tracepoint,
                by_decode=account.by_decode,
                unsure=account.unsure,
                fetches=account.fetches,
                silent=account.silent,
                ram_mmio=account.ram_mmio,
                again=account.again,
                done=loop.console.done,
                rip=loop.rip,
                checksum=loop.console.checksum,
                expected=guest.checksums[i] if guest else None,
            )
        )
    memory_right = None
    if done and guest is not None:
        digest = hashlib.sha256(session.ram.bytes).hexdigest()
        memory_right = digest == guest.final_sha256
    histograms = [loop.resolver.account.latency for loop in session.vcpus]
    if session.handler is not None:
        histograms.append(session.handler.account.latency)
    firsts = [v.console.first_instruction for v in session.vcpus]
    began = [first for first in firsts if first is not None]
    return Report(
        kvm=session.system.name,
        mode=session.mode.value,
        absent=session.view.name,
        guest=f"{guest.walk.value} walk, {guest.mode.value}" if guest else "not a built-in one",
        memory=session.ram.size,
        pages=session.ram.pages,
        pages_in=session.pager.pages_in,
        eager_pages=session.eager_pages,
        userfaults=session.handler.account.userfault if session.handler else 0,
        first_instruction=min(began) - session.began if began else None,
        seconds=seconds,
        latency=Latency.of(LatencyHistogram.merge(histograms)),
        vcpus=tuple(vcpus),
        memory_right=memory_right,
        verdict=_verdict(done, tuple(vcpus), memory_right),
        failure=None if session.failure is None else _failure(session),
    )


def _verdict(done: bool, vcpus: tuple[VcpuReport, ...], memory_right: bool | None) -> str:
    if not done:
        return "not done"
    if any(v.expected is not None and v.checksum != v.expected for v in vcpus):
        return "wrong checksum"
    if memory_right is None:
        return "done"  # not a guest whose results are known
    return "right" if memory_right else "wrong memory"


def _failure(session: Session) -> str:
    """The failure with what its own message does not say: which vCPU stood where."""
    text = str(session.failure)
    loop = session.failed_vcpu
    if loop is not None and not hasattr(session.failure, "rip"):
        text += f" (vCPU {loop.vcpu.vcpu_id} at rip {loop.rip:#x})"
    return text
