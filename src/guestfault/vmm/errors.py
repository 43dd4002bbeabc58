"""Why a vCPU stopped, when it was not done."""

from __future__ import annotations

from guestfault.errors import GuestfaultError
from guestfault.fault.access import Access
from guestfault.fault.cause.record import Cause

__all__ = ["GuestStoppedError", "PoisonedPageError", "UnlocatedFaultError"]


class GuestStoppedError(GuestfaultError):
    """A vCPU left KVM_RUN in a way from which this VMM cannot go on.

    ``what`` says how, ``vcpu_id`` and ``rip`` where.
    """

    def __init__(self, vcpu_id: int, rip: int, what: str) -> None:
        self.vcpu_id = vcpu_id
        self.rip = rip
        self.what = what
        super().__init__(f"vCPU {vcpu_id} at rip {rip:#x}: {what}")


class UnlocatedFaultError(GuestStoppedError):
    """KVM_RUN failed and nobody can say which access it was.  ``errno`` is positive."""

    def __init__(self, vcpu_id: int, rip: int, errno: int, why: str) -> None:
        self.errno = errno
        super().__init__(vcpu_id, rip, why)


class PoisonedPageError(GuestStoppedError):
    """The guest accessed a page whose content is lost, for which KVM sent the vCPU's thread SIGBUS.

    ``access`` is to that page and ``cause`` says what there is to do about it.  With another page,
    and the right content, in its place the vCPU can be run again.
    """

    def __init__(self, vcpu_id: int, rip: int, access: Access, cause: Cause) -> None:
        self.access = access
        self.cause = cause
        super().__init__(vcpu_id, rip, f"KVM sent SIGBUS: {access}: {cause}")
