"""The tracepoints that name the access behind a bare -EFAULT, and the right to listen to them.

Just before KVM_RUN fails, KVM passes a tracepoint that holds the address: ``kvm:kvm_page_fault``
on VMX and SVM, ``kvmmmu:kvm_mmu_pagetable_walk`` under shadow paging.  ``perf_event_open(2)``
hands its record to the very thread that failed.  That takes three things: tracefs, where the
events have their numbers and formats; KVM loaded, which registers them; and, because the record
is raw, either ``CAP_PERFMON`` or ``kernel.perf_event_paranoid`` at -1 (``perf_trace_event_perm``
in ``kernel/trace/trace_event_perf.c``).  Where an event can be read about, one is opened on this
thread and closed again, never enabled: it records nothing, and it is the only way to know of a
seccomp filter.  Elsewhere the rule is all there is to go by.

Without them guestfault decodes the instruction instead: slower, and with more than one candidate at
times.
"""

from __future__ import annotations

from pathlib import Path

from guestfault.check.finding import Finding, Status, Use
from guestfault.errors import KernelError, Unavailable
from guestfault.linux.mounts import mount_points
from guestfault.linux.perf_event import PerfEvent, allowed_by, refusal
from guestfault.linux.tracefs import EventFormat, Tracefs

__all__ = ["probe"]

EVENTS = (
    ("kvm", "kvm_page_fault", "the address on VMX and SVM"),
    ("kvmmmu", "kvm_mmu_pagetable_walk", "the address under shadow paging"),
    ("kvm", "kvm_userspace_exit", "each return to a VMM"),
)

NEEDED_FOR = (Use.TRACEPOINTS,)


def probe(
    mountinfo: str = "/proc/self/mountinfo", filesystems: str = "/proc/filesystems"
) -> tuple[Finding, ...]:
    """Look for tracefs and KVM's events in it, and for the right to read their records.

    Without tracefs nothing can be said about the events, and there is no finding for them.
    """
    try:
        tracefs = Tracefs.find(mount_points("tracefs", mountinfo=mountinfo))
    except Unavailable as error:
        return (_no_tracefs(error, filesystems), _perf(None))
    findings = [Finding("tracefs", Status.OK, f"at {tracefs.path}", needed_for=NEEDED_FOR)]
    readable = None
    for group, name, gives in EVENTS:
        try:
            readable = tracefs.event(group, name)
            found = Finding(f"{group}:{name}", Status.OK, gives, needed_for=NEEDED_FOR)
        except Unavailable as error:
            found = _missing(error.what, error.why, error.mend)
        findings.append(found)
    return (*findings, _perf(readable))


def _no_tracefs(error: Unavailable, filesystems: str) -> Finding:
    try:
        known = "tracefs" in Path(filesystems).read_text().split()
    except OSError:
        known = True
    if not known:
        return _missing("tracefs", "this kernel has none", "a kernel with CONFIG_TRACING")
    return _missing("tracefs", error.why, error.mend)


def _perf(event: EventFormat | None) -> Finding:
    name, grant = "perf records", allowed_by()
    if event is None:
        if grant is None:
            return _missing(name, *refusal())
    else:
        try:
            PerfEvent(event).close()
        except Unavailable as error:
            return _missing(name, error.why, error.mend)
        except KernelError as error:
            return _missing(name, str(error), "KVM may have been unloaded meanwhile: check again")
    return Finding(name, Status.OK, f"by {grant}", needed_for=NEEDED_FOR)


def _missing(name: str, detail: str, mend: str) -> Finding:
    return Finding(name, Status.MISSING, detail, mend, NEEDED_FOR)
