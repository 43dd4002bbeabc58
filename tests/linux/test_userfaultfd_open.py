import errno
import fcntl
import os

import pytest

from guestfault.errors import Unavailable
from guestfault.linux import userfaultfd_open
from guestfault.linux.userfaultfd_open import DEVICE, SYSCALL, Circumstances, grants
from guestfault.uapi import userfaultfd as uapi

READY = """
from guestfault.errors import Unavailable
from guestfault.linux.userfaultfd import Userfaultfd
"""
TRY = "try: Userfaultfd.open(); print('opened')\nexcept Unavailable as e: print(e)"

ROOT = Circumstances(sysctl="0", ptrace=True, seccomp=False)
USER = Circumstances(sysctl="0", ptrace=False, seccomp=False)


@pytest.mark.parametrize("way", userfaultfd_open.WAYS)
@pytest.mark.parametrize("user_mode_only", [False, True])
def test_each_way_gives_a_descriptor(way, user_mode_only):
    try:
        fd = userfaultfd_open.new(user_mode_only, (way,))
    except Unavailable as e:
        pytest.skip(f"needs userfaultfd: {e}")
    assert os.readlink(f"/proc/self/fd/{fd}") == "anon_inode:[userfaultfd]"
    assert not os.get_blocking(fd)
    assert fcntl.fcntl(fd, fcntl.F_GETFD) == fcntl.FD_CLOEXEC
    os.close(fd)


def test_without_privilege_each_way_and_each_grant_is_named(child):
    if os.path.exists("/dev/userfaultfd") and os.stat("/dev/userfaultfd").st_mode & 0o006:
        pytest.skip("/dev/userfaultfd is open to everyone here")
    if userfaultfd_open.Circumstances.here().sysctl != "0":
        pytest.skip("vm.unprivileged_userfaultfd is not 0 here")
    out = child(READY, TRY, unprivileged=True)
    assert out.startswith("userfaultfd: userfaultfd(2) answers EPERM (")
    assert "/dev/userfaultfd answers E" in out
    assert "CAP_SYS_PTRACE (root), or sysctl vm.unprivileged_userfaultfd=1 (now 0), or " in out


def test_user_mode_only_needs_no_privilege(child):
    out = child(READY, "print(Userfaultfd.open(user_mode_only=True).fd >= 0)", unprivileged=True)
    assert out == "True\n"


@pytest.mark.parametrize("number", [errno.EPERM, errno.ENOSYS])
def test_seccomp_is_found_out_whichever_errno_it_picks(child, number):
    code = TRY.replace("open()", "open(ways=('userfaultfd(2)',))")
    out = child(READY, code, refuse=((uapi.SYS_userfaultfd, None, number),))
    assert f"userfaultfd(2) answers {errno.errorcode[number]}" in out
    assert "seccomp profile that lets userfaultfd(2) pass" in out


def test_the_second_way_is_taken_when_the_first_is_stopped(child):
    if not os.access(DEVICE, os.R_OK | os.W_OK):
        pytest.skip("needs permission on /dev/userfaultfd")
    out = child(READY, TRY, refuse=((uapi.SYS_userfaultfd, None, errno.EPERM),))
    assert out == "opened\n"


@pytest.mark.parametrize(
    ("number", "here", "words"),
    [
        (errno.ENOSYS, Circumstances(None, True, True), "CONFIG_USERFAULTFD"),
        (errno.ENOSYS, Circumstances(None, True, False), "CONFIG_USERFAULTFD"),
        (errno.ENOSYS, Circumstances("0", True, True), "seccomp"),
        (errno.EPERM, ROOT, "initial user namespace"),
        (errno.EPERM, Circumstances("1", False, True), "seccomp"),
        (errno.EPERM, Circumstances("1", False, False), "security module"),
        (errno.EACCES, ROOT, "security module"),
        (errno.EMFILE, ROOT, "ulimit -n"),
        (errno.ENOMEM, ROOT, "ENOMEM"),
    ],
)
def test_one_grant_for_the_system_call(number, here, words):
    (grant,) = grants({SYSCALL: number}, False, here)
    assert words in grant


def test_an_unprivileged_process_in_a_filter_needs_both():
    for grant in grants({SYSCALL: errno.EPERM}, False, Circumstances("0", False, True)):
        assert "seccomp" in grant


def test_user_mode_only_on_an_old_kernel():
    assert grants({SYSCALL: errno.EINVAL}, True, USER) == [
        "Linux 5.11 or later, for UFFD_USER_MODE_ONLY"
    ]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOENT, "pass the device in"),
        (errno.EACCES, "permission to open /dev/userfaultfd"),
        (errno.EPERM, "device cgroup"),
        (errno.ENOTTY, "the real /dev/userfaultfd"),
        (errno.ENFILE, "fs.file-max"),
    ],
)
def test_one_grant_for_the_device(number, words):
    (grant,) = grants({DEVICE: number}, False, USER)
    assert words in grant
