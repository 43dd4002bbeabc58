"""Look, and judge: the cause of a failed access in one call."""

from __future__ import annotations

from guestfault.fault.access import Access
from guestfault.fault.cause.evidence import Failure, gather
from guestfault.fault.cause.judge import judge
from guestfault.fault.cause.record import Cause, Kind

__all__ = ["causes", "why"]


def causes(
    access: Access,
    failure: Failure | None = None,
    *,
    attributes: int | None = None,
    pid: int | str = "self",
) -> tuple[Cause, ...]:
    """Every cause that the evidence allows, the one to act on first; never empty.

    ``access`` is what failed, with an ``hva`` or with ``gpa`` and ``slot``.  ``failure`` is the
    outcome of its KVM_RUN: it tells what KVM said, which matters for guest_memfd and poisoned
    memory.  ``attributes`` are the page's as last set by ``KVM_SET_MEMORY_ATTRIBUTES``, 0 in a VM
    without that capability.  ``pid`` is the VMM's.

    Of an access over two pages, the first page that is to blame is told.

    Faults nothing in and wakes nobody.  Costs about as much as reading ``/proc/PID/smaps``.  Call
    it in the VMM's own time, while the vCPU is out of the guest.  Raises
    :class:`~guestfault.errors.KernelError` or :class:`~guestfault.errors.Unavailable` if
    ``/proc/PID`` may not be read.
    """
    judged = [
        judge(evidence) for evidence in gather(access, failure, attributes=attributes, pid=pid)
    ]
    return next((found for found in judged if found[0].kind is not Kind.PRESENT), judged[0])


def why(
    access: Access,
    failure: Failure | None = None,
    *,
    attributes: int | None = None,
    pid: int | str = "self",
) -> Cause:
    """The first of :func:`causes`, which is ``certain`` or the likeliest of several."""
    return causes(access, failure, attributes=attributes, pid=pid)[0]
