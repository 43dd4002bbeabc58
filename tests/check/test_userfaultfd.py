from __future__ import annotations

import ctypes
import errno
import os
import platform
import struct
from collections.abc import Callable
from typing import Any

import pytest

from guestfault.check import userfaultfd
from guestfault.check.finding import Finding, Status, Use
from guestfault.linux.procfs import sysctl
from guestfault.linux.userfaultfd_open import DEVICE, SYSCALL
from guestfault.uapi.userfaultfd import SYS_userfaultfd

InChild = Callable[[Callable[[], Any]], Any]

PR_SET_NO_NEW_PRIVS = 38
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000


def refuse_userfaultfd() -> None:
    """Put this process under a seccomp filter as containers have it: userfaultfd(2) is EPERM."""
    instructions = [
        (0x20, 0, 0, 0),  # load the system call's number
        (0x15, 0, 1, SYS_userfaultfd),  # not this one: skip one
        (0x06, 0, 0, SECCOMP_RET_ERRNO | errno.EPERM),
        (0x06, 0, 0, SECCOMP_RET_ALLOW),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *i) for i in instructions))
    program = ctypes.create_string_buffer(
        struct.pack("HxxxxxxQ", len(instructions), ctypes.addressof(code))
    )
    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) == 0
    assert libc.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, program, 0, 0) == 0, ctypes.get_errno()


def test_the_features_come_with_a_handle_and_only_with_one() -> None:
    handle, *features = userfaultfd.probe()
    names = [finding.name for finding in features]
    if handle.status is Status.MISSING:
        assert names == []
    else:
        assert names[:3] == ["MISSING_SHMEM", "MINOR_SHMEM", "SIGBUS"]


def test_without_a_way_there_is_no_handle() -> None:
    (handle,) = userfaultfd.probe(ways=())
    assert handle.status is Status.MISSING
    assert Use.DEMAND_PAGING in handle.needed_for


@pytest.mark.skipif(
    sysctl("vm.unprivileged_userfaultfd") != "0", reason="this machine lets everyone have one"
)
def test_without_a_grant_it_is_limited_and_each_grant_is_named(as_nobody: InChild) -> None:
    handle: Finding = as_nobody(lambda: userfaultfd.probe(ways=(SYSCALL,))[0])
    if handle.status is Status.MISSING:
        pytest.skip(f"not even for user mode: {handle.detail}")
    assert handle.status is Status.LIMITED
    assert "user-mode faults only" in handle.detail
    assert "CAP_SYS_PTRACE" in handle.mend
    assert "vm.unprivileged_userfaultfd=1" in handle.mend


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the number of the system call is x86's")
def test_a_seccomp_filter_is_suspected_by_name(as_nobody: InChild) -> None:
    def probe() -> Finding:
        refuse_userfaultfd()
        return userfaultfd.probe(ways=(SYSCALL,))[0]

    handle = as_nobody(probe)
    assert handle.status is Status.MISSING
    assert "EPERM" in handle.detail
    assert "seccomp" in handle.mend


@pytest.mark.skipif(not os.access(DEVICE, os.R_OK | os.W_OK), reason=f"no {DEVICE} for this user")
def test_the_device_helps_where_the_system_call_is_filtered(in_child: InChild) -> None:
    def probe() -> Finding:
        refuse_userfaultfd()
        return userfaultfd.probe()[0]

    handle = in_child(probe)
    assert handle.status is Status.OK
    assert handle.detail.endswith(f"by {DEVICE}")
