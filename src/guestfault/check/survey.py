"""Every subject's findings about this machine, in the order in which people need them."""

from __future__ import annotations

import os
from dataclasses import dataclass

import guestfault
from guestfault.check import (
    cgroup,
    kvm,
    memory,
    shared_memory,
    software,
    tracing,
    userfaultfd,
)
from guestfault.check.finding import Finding, Status, Use, readiness

__all__ = ["Subject", "Survey", "survey"]


@dataclass(frozen=True, slots=True)
class Subject:
    """The findings about one part of the machine."""

    title: str
    findings: tuple[Finding, ...]


@dataclass(frozen=True, slots=True)
class Survey:
    """What one machine offers one user: the subjects, and what the answers hold for.

    ``kernel`` and ``machine`` are as ``uname -r`` and ``-m`` say them; ``uid`` is effective.
    """

    version: str
    kernel: str
    machine: str
    uid: int
    subjects: tuple[Subject, ...]

    @property
    def findings(self) -> tuple[Finding, ...]:
        """All findings, of every subject."""
        return tuple(finding for subject in self.subjects for finding in subject.findings)

    @property
    def ready(self) -> dict[Use, Status]:
        """How far each use can go here; see :func:`~guestfault.check.finding.readiness`."""
        return readiness(self.findings)


def survey() -> Survey:
    """Ask this machine everything.  Takes some tenths of a second and changes nothing."""
    uname = os.uname()
    return Survey(
        version=guestfault.__version__,
        kernel=uname.release,
        machine=uname.machine,
        uid=os.geteuid(),
        subjects=(
            Subject("Software KVM", (*software.probe(), *memory.probe())),
            Subject("Kernel KVM", kvm.probe()),
            Subject("userfaultfd", userfaultfd.probe()),
            Subject("Tracepoints", tracing.probe()),
            Subject("Shared memory and huge pages", shared_memory.probe()),
            Subject("Limits", (cgroup.probe(),)),
        ),
    )
