"""One answer about this machine, as data."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

__all__ = ["Finding", "Status", "Use", "readiness"]


class Status(StrEnum):
    """How much of the thing is there.

    ``LIMITED`` works, with the restriction that the finding's detail states.
    """

    OK = "ok"
    LIMITED = "limited"
    MISSING = "missing"


class Use(StrEnum):
    """What a thing is needed for: the jobs of guestfault, most of all the first."""

    SOFTWARE_KVM = "software KVM"
    KERNEL_KVM = "kernel KVM"
    DEMAND_PAGING = "demand paging"
    ANNOTATED_EXITS = "annotated exits"
    TRACEPOINTS = "tracepoint hints"
    GUEST_MEMFD = "guest_memfd guests"
    HUGE_PAGES = "huge pages"
    SHARED_FILES = "guest RAM in files"


@dataclass(frozen=True, slots=True)
class Finding:
    """What was found out about one thing.

    ``detail`` says what is there or why it is not; ``mend`` the step that would provide the rest,
    empty only for ``Status.OK``; ``needed_for`` the uses that cannot do without the thing.
    """

    name: str
    status: Status
    detail: str
    mend: str = ""
    needed_for: tuple[Use, ...] = ()


_SEVERITY = (Status.OK, Status.LIMITED, Status.MISSING)


def readiness(findings: Iterable[Finding]) -> dict[Use, Status]:
    """How far each use can go on this machine: the worst status among the things it needs.

    A use that no finding is needed for is ``OK``.
    """
    worst = dict.fromkeys(Use, Status.OK)
    for finding in findings:
        for use in finding.needed_for:
            worst[use] = max(worst[use], finding.status, key=_SEVERITY.index)
    return worst
