import ctypes
import errno
import fcntl
import os
import signal
import termios

import pytest

from guestfault.errors import KernelError
from guestfault.linux.ioctl import call, check, ioctl, libc, syscall

pytestmark = pytest.mark.timeout(20)

SYS_READ = 0
SYS_GETPID = 39


@pytest.fixture
def pipe():
    ends = os.pipe()
    yield ends
    for fd in ends:
        os.close(fd)


def test_ioctl_fills_its_argument(pipe):
    os.write(pipe[1], b"12345")
    waiting = ctypes.c_int()
    assert ioctl(pipe[0], termios.FIONREAD, ctypes.byref(waiting)) == 0
    assert waiting.value == 5


def test_ioctl_takes_an_address(pipe):
    os.write(pipe[1], b"123")
    waiting = ctypes.c_int()
    assert ioctl(pipe[0], termios.FIONREAD, ctypes.addressof(waiting)) == 0
    assert waiting.value == 3


def test_ioctl_failure_is_a_negative_errno(pipe):
    assert ioctl(-1, termios.FIONREAD) == -errno.EBADF
    assert ioctl(pipe[0], termios.TCGETS) == -errno.ENOTTY
    assert ioctl(pipe[0], termios.FIONREAD, 1) == -errno.EFAULT


def test_syscall():
    assert syscall(SYS_GETPID) == os.getpid()
    assert syscall(SYS_READ, -1, 0, 0) == -errno.EBADF


def test_a_blocked_call_holds_no_gil(pipe, start):
    byte = ctypes.create_string_buffer(1)
    reader = start(syscall, SYS_READ, pipe[0], ctypes.addressof(byte), 1)
    assert reader.sleeps()
    os.write(pipe[1], b"x")
    assert reader.result() == 1
    assert byte.raw == b"x"


def test_eintr_is_not_retried(pipe, start):
    byte = ctypes.create_string_buffer(1)
    before = signal.signal(signal.SIGUSR1, lambda *_: None)
    try:
        reader = start(syscall, SYS_READ, pipe[0], ctypes.addressof(byte), 1)
        while reader.sleeps(0.01):
            signal.pthread_kill(reader.ident, signal.SIGUSR1)
        assert reader.result() == -errno.EINTR
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_call_reads_errno_of_libc():
    dup = libc.dup
    dup.argtypes = [ctypes.c_int]
    assert call(dup, -1) == -errno.EBADF
    fd = call(dup, 0)
    assert fcntl.fcntl(fd, fcntl.F_GETFD) == 0
    os.close(fd)


def test_check_passes_results_and_raises_failures():
    assert check(7, "dup") == 7
    with pytest.raises(KernelError, match=r"^dup: EMFILE .*: of stdin$") as caught:
        check(-errno.EMFILE, "dup", "of stdin")
    assert caught.value.errno == errno.EMFILE
    assert caught.value.call == "dup"
