"""The account of a run: what was asked, what it took, and whether the guest's results are right."""

from __future__ import annotations

import hashlib
from dataclasses import asdict, dataclass
from typing import Any

from guestfault.paging.ahead import Ahead, AheadCount
from guestfault.paging.histogram import LatencyHistogram
from guestfault.vmm.session import Session

__all__ = [
    "AheadReport",
    "Latency",
    "LostPage",
    "PrefetchReport",
    "Report",
    "VcpuReport",
    "report",
]


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
class AheadReport:
    """Pages that came in for one reason before they were asked for.

    ``useful`` is the fraction of them that the guest then went to, ``wasted`` the rest of them: by
    estimate, from ``wanted`` of ``withheld`` pages (:mod:`guestfault.paging.ahead`), and ``None``
    where none was withheld.  ``span`` is between which fractions ``useful`` is, 95 times in 100.
    """

    pages: int
    withheld: int
    wanted: int
    useful: float | None
    wasted: float | None
    span: tuple[float, float] | None

    @classmethod
    def of(cls, count: AheadCount) -> AheadReport:
        """What the pager has counted."""
        useful = count.useful
        wasted = None if useful is None else 1 - useful
        return cls(count.pages, count.withheld, count.wanted, useful, wasted, count.useful_span)


@dataclass(frozen=True, slots=True)
class PrefetchReport:
    """How a plan went: its pages, the reads of it that failed, and whether it was given up."""

    planned: int
    failed: int
    gave_up: bool


@dataclass(frozen=True, slots=True)
class LostPage:
    """A page of broken memory that KVM sent ``vcpu``'s thread SIGBUS for.

    ``accessed``: by this vCPU, which cannot get past it.  ``gpa`` is ``None`` for a page of the
    process's that is none of the guest's.
    """

    vcpu: int
    gpa: int | None
    hva: int | None
    accessed: bool


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
    """A run, finished or not.  Times in seconds, sizes in bytes, pages of 4096 bytes.

    ``pages_in`` is ``eager_pages`` from before the start, ``demanded`` because somebody needed
    them, and those of ``ahead``, by the reason for it: ``around``, ``prefetch`` or ``push``.
    """

    kvm: str
    mode: str
    absent: str
    guest: str
    memory: int
    pages: int
    pages_in: int
    eager_pages: int
    demanded: int
    ahead: dict[str, AheadReport]
    prefetch: PrefetchReport | None
    userfaults: int
    first_instruction: float | None
    seconds: float
    latency: Latency
    vcpus: tuple[VcpuReport, ...]
    lost_pages: tuple[LostPage, ...]
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
        demanded=session.pager.pages_in - session.pager.ahead - session.eager_pages,
        ahead={w.name.lower(): AheadReport.of(session.pager.counts[w]) for w in Ahead},
        prefetch=_prefetch(session),
        userfaults=session.handler.account.userfault if session.handler else 0,
        first_instruction=min(began) - session.began if began else None,
        seconds=seconds,
        latency=Latency.of(LatencyHistogram.merge(histograms)),
        vcpus=tuple(vcpus),
        lost_pages=tuple(
            LostPage(i, page.gpa, page.hva, accessed)
            for i, loop in enumerate(session.vcpus)
            for page, accessed in loop.lost.items()
        ),
        memory_right=memory_right,
        verdict=_verdict(done, tuple(vcpus), memory_right),
        failure=None if session.failure is None else _failure(session),
    )


def _prefetch(session: Session) -> PrefetchReport | None:
    if session.prefetcher is None:
        return None
    account = session.prefetcher.account
    return PrefetchReport(account.planned, account.failed, account.gave_up)


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
