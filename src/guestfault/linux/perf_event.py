"""``perf_event_open(2)`` for tracepoints: a thread listens to what the kernel does in its name.

A :class:`PerfEvent` of the calling thread records every pass of that thread, and of no other,
through one tracepoint, on whichever CPU it runs.  The raw record (:mod:`guestfault.linux.tracefs`
knows its fields) goes to a ring (:mod:`guestfault.linux.perf_ring`) in memory that the thread can
read without a system call.  Several events may share a ring, in which their records stand in the
order in which they happened: :meth:`PerfEvent.write_to`.

A raw record shows kernel data, so it takes a capability or a sysctl (``perf_trace_event_perm`` in
``kernel/trace/trace_event_perf.c``): :func:`allowed_by` tells what grants it here, and a refusal is
an :class:`~guestfault.errors.Unavailable` that says what would.
"""

from __future__ import annotations

import errno
import mmap
import os
from ctypes import addressof

from guestfault.closing import Closing
from guestfault.errors import KernelError, Unavailable
from guestfault.linux import procfs
from guestfault.linux.ioctl import check, ioctl, syscall
from guestfault.linux.perf_ring import OverwriteRing, QueueRing
from guestfault.linux.tracefs import EventFormat
from guestfault.uapi import perf as uapi

__all__ = ["RAW_OFFSET", "PerfEvent", "allowed_by"]

RAW_OFFSET = 12
"""Where the raw trace record begins in a sample: behind the header and its own ``u32`` size."""

_WHAT = "perf events"

# include/uapi/linux/capability.h
_CAPABILITIES = {"CAP_PERFMON": 38, "CAP_SYS_ADMIN": 21}
_PARANOID = "kernel.perf_event_paranoid"


class PerfEvent(Closing):
    """One tracepoint on one thread, by its descriptor ``fd``; disabled until :meth:`enable`.

    ``thread`` is a thread id, 0 the calling thread.  ``overwrite`` chooses the direction of the
    ring that it will have or share; all events of a ring agree on thread and direction.  Threads
    and children that the thread starts are not recorded.

    Raises :class:`~guestfault.errors.Unavailable` if this process may not, saying which grant would
    do, and :class:`~guestfault.errors.KernelError`: EINVAL for a tracepoint that is no more, ESRCH
    for a thread.
    """

    def __init__(self, event: EventFormat, *, thread: int = 0, overwrite: bool = False) -> None:
        attr = uapi.perf_event_attr(
            type=uapi.PERF_TYPE_TRACEPOINT,
            size=uapi.PERF_ATTR_SIZE_VER7,
            config=event.id,
            sample_period=1,
            sample_type=uapi.PERF_SAMPLE_RAW,
            disabled=1,
            write_backward=overwrite,
        )
        self.event = event
        self._overwrite = overwrite
        self._mapping: mmap.mmap | None = None
        self._ring: OverwriteRing | QueueRing | None = None
        self.fd = _open(attr, thread, event.name)

    def map_queue(self, pages: int = 1) -> QueueRing:
        """Give it a ring that keeps the oldest, with 2^n ``pages`` of records.

        Raises :class:`~guestfault.errors.Unavailable` if that is more memory than this user may
        lock for perf.  The ring lives until :meth:`close`.
        """
        if self._overwrite:
            raise ValueError("the event was made for a ring that keeps the newest")
        self._ring = ring = QueueRing(self._map(pages, mmap.PROT_READ | mmap.PROT_WRITE))
        return ring

    def map_overwrite(self, pages: int = 1) -> OverwriteRing:
        """Give it a ring that keeps the newest; otherwise as :meth:`map_queue`."""
        if not self._overwrite:
            raise ValueError("the event was made for a ring that keeps the oldest")
        # A mapping without PROT_WRITE is what tells the kernel to write over old records.
        self._ring = ring = OverwriteRing(self._map(pages, mmap.PROT_READ))
        return ring

    def write_to(self, other: PerfEvent) -> None:
        """Let its records go to the ring of ``other``, which has one; in the order of happening.

        The first two bytes of a raw record (``common_type``) are its event's number.
        """
        result = ioctl(self.fd, uapi.PERF_EVENT_IOC_SET_OUTPUT, other.fd)
        check(result, "PERF_EVENT_IOC_SET_OUTPUT", f"{self.event.name} to {other.event.name}")

    def filter(self, expression: str) -> None:
        """Record only what satisfies an expression over the fields, such as ``load == 1``.

        The language is that of ``Documentation/trace/events.rst``.  Raises
        :class:`~guestfault.errors.KernelError`, EINVAL for a bad expression.
        """
        result = ioctl(self.fd, uapi.PERF_EVENT_IOC_SET_FILTER, expression.encode())
        check(result, "PERF_EVENT_IOC_SET_FILTER", f"{self.event.name}: {expression}")

    def enable(self) -> None:
        """Begin to record."""
        result = ioctl(self.fd, uapi.PERF_EVENT_IOC_ENABLE, 0)
        check(result, "PERF_EVENT_IOC_ENABLE", self.event.name)

    def disable(self) -> None:
        """Stop recording; the ring keeps what it has."""
        result = ioctl(self.fd, uapi.PERF_EVENT_IOC_DISABLE, 0)
        check(result, "PERF_EVENT_IOC_DISABLE", self.event.name)

    def count(self) -> int:
        """How often the thread has passed it while enabled, recorded or lost.  ``read(2)``."""
        try:
            return int.from_bytes(os.read(self.fd, 8), "little")
        except OSError as error:
            raise KernelError("read", error.errno or 0, f"{_WHAT}: {self.event.name}") from None

    def close(self) -> None:
        """Stop listening, and unmap the ring.  May be called again."""
        if self._ring is not None:
            self._ring.release()
            self._ring = None
        if self._mapping is not None:
            self._mapping.close()
            self._mapping = None
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def _map(self, pages: int, prot: int) -> memoryview:
        if self._mapping is not None:
            raise ValueError("the event has its ring already")
        size = (1 + pages) * mmap.PAGESIZE
        try:
            self._mapping = mmap.mmap(self.fd, size, mmap.MAP_SHARED, prot)
        except OSError as error:
            if error.errno == errno.EPERM:
                why = f"a ring of {size} bytes is more than this user may lock"
                mend = "sysctl kernel.perf_event_mlock_kb=1024 (as root), or CAP_IPC_LOCK"
                raise Unavailable(_WHAT, why, mend) from None
            raise KernelError("mmap", error.errno or 0, f"{_WHAT}: {size} bytes") from None
        return memoryview(self._mapping)


def _open(attr: uapi.perf_event_attr, thread: int, name: str) -> int:
    flags = uapi.PERF_FLAG_FD_CLOEXEC
    fd = syscall(uapi.SYS_perf_event_open, addressof(attr), thread, -1, -1, flags)
    if fd >= 0:
        return fd
    match -fd:
        case errno.EACCES | errno.EPERM:
            raise Unavailable(_WHAT, *refusal())
        case errno.ENOSYS:
            filtered = procfs.seccomp_filtered() and procfs.sysctl(_PARANOID) is not None
            raise Unavailable(_WHAT, *(_FILTERED if filtered else _NONE))
        case errno.EMFILE | errno.ENFILE:
            mend = "raise the limit (ulimit -n, fs.file-max)"
            raise Unavailable(_WHAT, "no free file descriptor", mend)
        case number:
            raise KernelError("perf_event_open", number, f"tracepoint {name}, thread {thread}")


_NONE = ("this kernel has none", "use a kernel with CONFIG_PERF_EVENTS")
_FILTERED = (
    "a seccomp filter stops perf_event_open(2)",
    "use a seccomp profile that lets it pass",
)
_GRANT = f"either CAP_PERFMON for this process, or sysctl {_PARANOID}=-1 (as root)"


def allowed_by() -> str | None:
    """What entitles this process to raw trace records, by the kernel's rule; ``None`` if nothing.

    The rule is not all: a seccomp filter or a security module may refuse nevertheless, and a
    capability counts only if it is held in the initial user namespace.
    """
    for name, number in _CAPABILITIES.items():
        if procfs.has_capability(number):
            return name
    paranoid = procfs.sysctl(_PARANOID)
    return f"{_PARANOID} at {paranoid}" if paranoid is not None and int(paranoid) < 0 else None


def refusal() -> tuple[str, str]:
    """Why an event would be refused here, and the mend: the two halves of an ``Unavailable``."""
    paranoid = procfs.sysctl(_PARANOID)
    if paranoid is None:
        return _NONE
    grant = allowed_by()
    if grant is None:
        return f"perf_event_paranoid is {paranoid}, and there is no CAP_PERFMON", _GRANT
    if procfs.seccomp_filtered():
        return _FILTERED
    why = f"refused in spite of {grant}"
    return why, "CAP_PERFMON in the initial user namespace, and leave of the security module"
