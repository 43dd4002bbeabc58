"""The first process of a machine in the lab: makes the system around a command, and runs it.

Started by the kernel as ``python3 -m guestfault.lab.inside``, from an initramfs
(:mod:`~guestfault.lab.initramfs`) that has nothing else in it.  It mounts what a program expects to
find (``/proc``, ``/sys`` with tracefs, ``/dev``, ``/tmp``), loads KVM's modules, and runs the
command of ``/lab/job.json`` with its output going out in frames
(:mod:`~guestfault.lab.frames`) over the second serial port; the first is the kernel's console.

It must do with what is there: no C program, no shell, and of this package only the frames.  What
goes wrong here is told in a frame and ends the machine, as the end of the command does.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import json
import os
import select
import signal
import socket
import struct
import termios
import time
import traceback
from pathlib import Path
from typing import Any, NoReturn

from guestfault.lab.frames import MAX_PAYLOAD, Kind, encode

__all__ = ["JOB", "MODULES", "PORT", "main"]

PORT = "/dev/ttyS1"
"""Where the frames go."""
JOB = "/lab/job.json"
"""What is to be done: ``command``, ``environment``, ``files``, ``needs_kvm``."""
MODULES = "/lab/modules"
"""Where the modules are, in files whose names sort in the order of loading."""

_KVM = "/dev/kvm"
_MOUNTS = (
    ("proc", "/proc"),
    ("sysfs", "/sys"),
    ("devtmpfs", "/dev"),
    ("tmpfs", "/dev/shm"),
    ("tmpfs", "/tmp"),
    ("tmpfs", "/run"),
    ("tracefs", "/sys/kernel/tracing"),
    ("debugfs", "/sys/kernel/debug"),
)
_NEEDED = frozenset({"/proc", "/sys", "/dev"})
_RB_AUTOBOOT = 0x01234567
_FINIT_MODULE = 313
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1
_IFREQ = struct.Struct("16sH22x")

_libc = ctypes.CDLL(None, use_errno=True)


def main() -> NoReturn:
    """Do the job, and end the machine."""
    port = -1
    try:
        _mount_all()
        _let_reserve()
        port = _open_port()
        _tell(port, Kind.HELLO, json.dumps(_self()).encode())
        job = json.loads(Path(JOB).read_text())
        _loopback_up()
        _do(port, job)
    except BaseException:  # there is nobody else to tell
        account = traceback.format_exc()
        if port >= 0:
            _tell(port, Kind.FAILED, account.encode()[-MAX_PAYLOAD:])
        else:
            print(account, flush=True)  # the console
    _end(port)


def _do(port: int, job: dict[str, Any]) -> None:
    trouble = _load_modules()
    no_kvm = _no_kvm(trouble)
    if no_kvm and job["needs_kvm"]:
        _tell(port, Kind.NO_KVM, no_kvm.encode()[-MAX_PAYLOAD:])
        return
    _tell(port, Kind.READY)
    status = _run(port, job["command"], job["environment"])
    for path in job["files"]:
        _send_file(port, path)
    _tell(port, Kind.STATUS, str(status).encode())


def _end(port: int) -> NoReturn:
    if port >= 0:
        _tell(port, Kind.DONE)
        with contextlib.suppress(OSError, termios.error):
            termios.tcdrain(port)
    # An emulator is told to end where a machine would start anew, and any kernel can do that.
    _libc.reboot(_RB_AUTOBOOT)
    while True:
        signal.pause()


# -- the system ----------------------------------------------------------------------------------


def _mount_all() -> None:
    for fstype, where in _MOUNTS:
        with contextlib.suppress(OSError):
            os.makedirs(where, exist_ok=True)
        if _libc.mount(b"none", where.encode(), fstype.encode(), 0, None) and where in _NEEDED:
            raise _failure("mount", where)


def _let_reserve() -> None:
    """Let programs reserve more memory than there is: Unicorn does, and uses little of it."""
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/overcommit_memory").write_text("1")


def _open_port() -> int:
    port = os.open(PORT, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    mode = termios.tcgetattr(port)
    mode[0] = mode[1] = mode[3] = 0  # no line discipline: bytes as they are
    mode[2] = termios.CS8 | termios.CREAD | termios.CLOCAL
    mode[4] = mode[5] = termios.B115200
    termios.tcsetattr(port, termios.TCSANOW, mode)
    return port


def _self() -> dict[str, Any]:
    return {"release": os.uname().release, "seconds": time.clock_gettime(time.CLOCK_BOOTTIME)}


def _loopback_up() -> None:
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_:
        request = fcntl.ioctl(any_, _SIOCGIFFLAGS, _IFREQ.pack(b"lo", 0))
        name, flags = _IFREQ.unpack(request)
        fcntl.ioctl(any_, _SIOCSIFFLAGS, _IFREQ.pack(name, flags | _IFF_UP))


def _parameters(name: str, command_line: str) -> str:
    """A module's parameters from the kernel's command line, as modprobe would give them to it."""
    words = command_line.partition(" -- ")[0].split()
    pairs = (word.partition(".") for word in words)
    return " ".join(rest for module, _, rest in pairs if module.replace("-", "_") == name)


def _load_modules() -> str:
    """Load all that came along; what went wrong, or nothing."""
    if not os.path.isdir(MODULES):
        return ""
    line = Path("/proc/cmdline").read_text()
    for file in sorted(os.listdir(MODULES)):
        name = file.split("-", 1)[1].removesuffix(".ko")
        descriptor = os.open(f"{MODULES}/{file}", os.O_RDONLY | os.O_CLOEXEC)
        try:
            if _libc.syscall(_FINIT_MODULE, descriptor, _parameters(name, line).encode(), 0):
                return f"module {name}: {_failure('finit_module', name).strerror}"
        finally:
            os.close(descriptor)
    return ""


def _no_kvm(trouble: str) -> str:
    """Why there is no ``/dev/kvm``; empty if there is one."""
    try:
        os.close(os.open(_KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        why = trouble or f"{_KVM}: {error.strerror}"
        said = [line for line in _kernel_log() if line.startswith(("kvm", "SVM"))]
        return f"{why}; it says: {said[-1]}" if said else why
    return ""


def _kernel_log() -> list[str]:
    lines = []
    with contextlib.suppress(OSError):
        log = os.open("/dev/kmsg", os.O_RDONLY | os.O_NONBLOCK)
        while True:
            record = os.read(log, 8192).decode("utf-8", "replace")
            lines.append(record.partition(";")[2].splitlines()[0])
    return lines


def _failure(call: str, what: str) -> OSError:
    errno = ctypes.get_errno()
    return OSError(errno, os.strerror(errno), f"{call}: {what}")


# -- the command ---------------------------------------------------------------------------------


def _run(port: int, command: list[str], environment: dict[str, str]) -> int:
    """Run it, with its output told; its exit status as a shell would say it."""
    os.environ.update(environment)
    out, out_inside = os.pipe()
    err, err_inside = os.pipe()
    child = os.fork()
    if child == 0:
        _become(command, out_inside, err_inside)
    os.close(out_inside)
    os.close(err_inside)
    return _follow(port, child, {out: Kind.STDOUT, err: Kind.STDERR})


def _become(command: list[str], out: int, err: int) -> NoReturn:
    try:
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out, 1)
        os.dup2(err, 2)
        os.chdir("/root" if os.path.isdir("/root") else "/")
        try:
            os.execvp(command[0], command)
        except OSError as error:
            os.write(2, f"{command[0]}: {error.strerror}\n".encode())
            os._exit(127 if isinstance(error, FileNotFoundError) else 126)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    os._exit(126)


def _follow(port: int, child: int, pipes: dict[int, Kind]) -> int:
    """Until the command has ended and what it wrote is told; what it left running may go on.

    The first process is also the parent of every orphan, and has to bury it.
    """
    status: int | None = None
    poll = select.poll()
    for pipe in pipes:
        poll.register(pipe, select.POLLIN)
        os.set_blocking(pipe, False)
    # A child's end interrupts the poll, which is all that is wanted of the signal.
    wakes, wake = os.pipe()
    os.set_blocking(wake, False)
    os.set_blocking(wakes, False)
    poll.register(wakes, select.POLLIN)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    while True:
        ended = _buried()
        status = ended.get(child, status)
        if status is not None:
            for pipe, kind in pipes.items():
                while _pass_on(port, pipe, kind):
                    pass
            return status
        for ready, _ in poll.poll(1000):
            if ready == wakes:
                with contextlib.suppress(BlockingIOError):
                    os.read(wakes, 512)
            elif not _pass_on(port, ready, pipes[ready]):
                poll.unregister(ready)


def _buried() -> dict[int, int]:
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            process, status = os.waitpid(-1, os.WNOHANG)
            if process == 0:
                break
            code = os.waitstatus_to_exitcode(status)
            ended[process] = code if code >= 0 else 128 - code
    return ended


def _pass_on(port: int, pipe: int, kind: Kind) -> bool:
    """Tell what is in a pipe now; whether anything was."""
    try:
        data = os.read(pipe, MAX_PAYLOAD)
    except BlockingIOError:
        return False
    if data:
        _tell(port, kind, data)
    return bool(data)


def _send_file(port: int, path: str) -> None:
    name = os.fsencode(path) + b"\0"
    try:
        with open(path, "rb") as file:
            _tell(port, Kind.FILE, name)  # that it is there, if it is empty
            while part := file.read(MAX_PAYLOAD - len(name)):
                _tell(port, Kind.FILE, name + part)
    except OSError as error:
        _tell(port, Kind.MISSING, name + (error.strerror or str(error)).encode())


def _tell(port: int, kind: Kind, payload: bytes = b"") -> None:
    left = memoryview(encode(kind, payload))
    while left:
        left = left[os.write(port, left) :]


if __name__ == "__main__":
    main()
