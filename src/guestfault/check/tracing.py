"""The tracepoints that name the access behind a bare -EFAULT, and the right to listen to them.

Just before KVM_RUN fails, KVM passes a tracepoint that holds the address: ``kvm:kvm_page_fault``
on VMX and SVM, ``kvmmmu:kvm_mmu_pagetable_walk`` under shadow paging.  ``perf_event_open(2)``
hands its record to the very thread that failed.  That takes three things: tracefs, where the
events have their numbers and formats; KVM loaded, which registers them; and, because the record
is raw, either ``CAP_PERFMON`` or ``kernel.perf_event_paranoid`` at -1 (``perf_trace_event_perm``
in ``kernel/trace/trace_event_perf.c``).

Without them guestfault decodes the instruction instead: slower, and with more than one candidate at
times.
"""

from __future__ import annotations

import os
from pathlib import Path

from guestfault.check.finding import Finding, Status, Use
from guestfault.check.mounts import mount_points
from guestfault.linux.procfs import has_capability, sysctl

__all__ = ["probe"]

# include/uapi/linux/capability.h
CAP_SYS_ADMIN = 21
CAP_PERFMON = 38

EVENTS = (
    ("kvm/kvm_page_fault", "the address on VMX and SVM"),
    ("kvmmmu/kvm_mmu_pagetable_walk", "the address under shadow paging"),
    ("kvm/kvm_userspace_exit", "each return to a VMM"),
)

NEEDED_FOR = (Use.TRACEPOINTS,)
TRACEFS = "/sys/kernel/tracing"


def probe(
    mountinfo: str = "/proc/self/mountinfo", filesystems: str = "/proc/filesystems"
) -> tuple[Finding, ...]:
    """Look for tracefs and KVM's events in it, and for the right to read their records.

    Without tracefs nothing can be said about the events, and there is no finding for them.
    """
    mounted = mount_points("tracefs", mountinfo=mountinfo)
    readable = [path for path in mounted if os.access(path / "events", os.R_OK | os.X_OK)]
    if not readable:
        return (_no_tracefs(mounted, filesystems), _perf())
    tracefs = Finding("tracefs", Status.OK, f"at {readable[0]}", needed_for=NEEDED_FOR)
    return (tracefs, *(_event(readable[0], event, gives) for event, gives in EVENTS), _perf())


def _no_tracefs(mounted: tuple[Path, ...], filesystems: str) -> Finding:
    if mounted:
        detail = f"mounted at {mounted[0]}, closed to this user"
        return _missing("tracefs", detail, _open_up(mounted[0]))
    try:
        known = "tracefs" in Path(filesystems).read_text().split()
    except OSError:
        known = True
    if not known:
        return _missing("tracefs", "this kernel has none", "a kernel with CONFIG_TRACING")
    return _missing("tracefs", "not mounted", f"mount -t tracefs tracefs {TRACEFS} (as root)")


def _open_up(tracefs: Path) -> str:
    return f"mount -o remount,mode=750,gid=GROUP {tracefs} (as root), with a group of yours"


def _event(tracefs: Path, event: str, gives: str) -> Finding:
    name = event.replace("/", ":")
    directory = tracefs / "events" / event
    if os.access(directory / "id", os.R_OK) and os.access(directory / "format", os.R_OK):
        return Finding(name, Status.OK, gives, needed_for=NEEDED_FOR)
    if directory.exists():
        return _missing(name, "closed to this user", _open_up(tracefs))
    if not directory.parent.exists():
        return _missing(name, "KVM has registered no events", "load KVM: see /dev/kvm")
    return _missing(name, "this kernel's KVM has no such event", "an x86 kernel with CONFIG_KVM")


def _perf() -> Finding:
    name = "perf records"
    paranoid = sysctl("kernel.perf_event_paranoid")
    if paranoid is None:
        return _missing(name, "this kernel has no perf events", "a kernel with CONFIG_PERF_EVENTS")
    for capability, number in (("CAP_PERFMON", CAP_PERFMON), ("CAP_SYS_ADMIN", CAP_SYS_ADMIN)):
        if has_capability(number):
            return Finding(name, Status.OK, f"by {capability}", needed_for=NEEDED_FOR)
    detail = f"perf_event_paranoid is {paranoid}"
    if int(paranoid) <= -1:
        return Finding(name, Status.OK, detail, needed_for=NEEDED_FOR)
    mend = "either CAP_PERFMON for this process, or sysctl kernel.perf_event_paranoid=-1 (as root)"
    return _missing(name, f"{detail}, and there is no CAP_PERFMON", mend)


def _missing(name: str, detail: str, mend: str) -> Finding:
    return Finding(name, Status.MISSING, detail, mend, NEEDED_FOR)
