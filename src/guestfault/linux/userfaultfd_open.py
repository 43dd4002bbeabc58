"""Getting a userfaultfd, and saying what is in the way when there is none to be had.

There are two ways (``fs/userfaultfd.c``):

- ``userfaultfd(2)``.  One that catches faults of kernel code too (KVM's, ``copy_from_user``'s)
  takes ``CAP_SYS_PTRACE`` in the initial user namespace or ``vm.unprivileged_userfaultfd=1``, for
  whoever can hold up the kernel in the middle of an operation helps an attacker.  One for user mode
  only (Linux 5.11) takes nothing.
- ``/dev/userfaultfd`` (Linux 6.1).  Whoever may open the file may have any userfaultfd.

Either can be refused by something else besides: a container's seccomp filter answers for the first
(with EPERM or ENOSYS, as it pleases), a device cgroup or a missing node for the second.  A service
that failed with ``EPERM`` alone has cost its operators days; the error says what each way answered
and which single grants would do.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from guestfault.errors import Unavailable
from guestfault.linux import procfs
from guestfault.linux.ioctl import ioctl, syscall
from guestfault.uapi import userfaultfd as uapi

__all__ = ["DEVICE", "SYSCALL", "WAYS", "Circumstances", "grants", "new"]

SYSCALL = "userfaultfd(2)"
DEVICE = "/dev/userfaultfd"
WAYS = (SYSCALL, DEVICE)
"""Both ways, in the order in which they are tried."""


def _by_syscall(flags: int) -> int:
    return syscall(uapi.SYS_userfaultfd, flags)


def _by_device(flags: int) -> int:
    try:
        device = os.open(DEVICE, os.O_RDWR | os.O_CLOEXEC)
    except OSError as e:
        return -(e.errno or errno.EIO)
    try:
        return ioctl(device, uapi.USERFAULTFD_IOC_NEW, flags)
    finally:
        os.close(device)


_OPENERS: dict[str, Callable[[int], int]] = {SYSCALL: _by_syscall, DEVICE: _by_device}


def new(user_mode_only: bool = False, ways: tuple[str, ...] = WAYS) -> int:
    """A new userfaultfd, non-blocking and close-on-exec, by the first of ``ways`` that gives one.

    Raises :class:`~guestfault.errors.Unavailable` with the answer of each way and what would help.
    """
    flags = os.O_CLOEXEC | os.O_NONBLOCK | (uapi.UFFD_USER_MODE_ONLY if user_mode_only else 0)
    refusals: dict[str, int] = {}
    for way in ways:
        fd = _OPENERS[way](flags)
        if fd >= 0:
            return fd
        refusals[way] = -fd
    why = ", ".join(
        f"{way} answers {errno.errorcode.get(number, number)} ({os.strerror(number)})"
        for way, number in refusals.items()
    )
    choice = grants(refusals, user_mode_only, Circumstances.here())
    raise Unavailable("userfaultfd", why, "any one of these would do: " + ", or ".join(choice))


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What decides about ``userfaultfd(2)``, as far as a process can see.

    ``sysctl`` is the value of ``vm.unprivileged_userfaultfd``, ``None`` if the kernel has none.
    """

    sysctl: str | None
    ptrace: bool
    seccomp: bool

    @classmethod
    def here(cls) -> Self:
        """This process's."""
        return cls(
            sysctl=procfs.sysctl("vm.unprivileged_userfaultfd"),
            ptrace=procfs.has_capability(procfs.CAP_SYS_PTRACE),
            seccomp=procfs.seccomp_filtered(),
        )


def grants(refusals: dict[str, int], user_mode_only: bool, here: Circumstances) -> list[str]:
    """What would open one of the refused ways, one sentence each; any single one is enough.

    ``refusals`` has the positive errno of each way that was tried.
    """
    choice: list[str] = []
    if SYSCALL in refusals:
        choice += _grants_for_syscall(refusals[SYSCALL], user_mode_only, here)
    if DEVICE in refusals:
        choice.append(_grant_for_device(refusals[DEVICE]))
    return choice


def _grants_for_syscall(number: int, user_mode_only: bool, here: Circumstances) -> list[str]:
    filtered = "a seccomp profile that lets userfaultfd(2) pass (the present one stops it)"
    match number:
        case errno.ENOSYS if here.seccomp and here.sysctl is not None:
            return [filtered]
        case errno.ENOSYS:
            return ["a kernel built with CONFIG_USERFAULTFD"]
        case errno.EPERM if user_mode_only or here.sysctl == "1":
            return [
                filtered if here.seccomp else "leave of the security module (see the audit log)"
            ]
        case errno.EPERM if here.ptrace and here.seccomp:
            return [filtered]
        case errno.EPERM if here.ptrace:
            return ["CAP_SYS_PTRACE in the initial user namespace (here it is held in another)"]
        case errno.EPERM:
            also = ", in a seccomp profile that lets userfaultfd(2) pass" if here.seccomp else ""
            return [
                f"CAP_SYS_PTRACE (root){also}",
                f"sysctl vm.unprivileged_userfaultfd=1 (now {here.sysctl}){also}",
            ]
        case errno.EACCES:
            return ["leave of the security module (see the audit log)"]
        case errno.EINVAL if user_mode_only:
            return ["Linux 5.11 or later, for UFFD_USER_MODE_ONLY"]
        case _:
            return [_resource(number)]


def _grant_for_device(number: int) -> str:
    match number:
        case errno.ENOENT:
            return f"{DEVICE} itself (Linux 6.1 or later; in a container, pass the device in)"
        case errno.EACCES:
            return f"permission to open {DEVICE} (its owner, mode or ACL; a udev rule lasts)"
        case errno.EPERM:
            return f"leave of the device cgroup to open {DEVICE}"
        case errno.ENOTTY:
            return f"the real {DEVICE}: what is there is something else"
        case _:
            return _resource(number)


def _resource(number: int) -> str:
    if number in (errno.EMFILE, errno.ENFILE):
        return "a free file descriptor (ulimit -n, fs.file-max)"
    return f"what lifts {errno.errorcode.get(number, number)} ({os.strerror(number)})"
