"""Starts QEMU, and sees to it that it ends.

It is given everything as open files - the initramfs in a memfd, a socket for each serial port - so
there is no file to remove afterwards, however the machine or this process ends.  It runs in a
session of its own, where no Ctrl-C meant for us reaches it; it is killed when the ``with`` block
ends in any way, and the kernel kills it if this process is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from guestfault.lab.image import Kernel
from guestfault.lab.qemu import Qemu
from guestfault.lab.store import storing

__all__ = ["Machine", "started"]

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Machine:
    """A QEMU that runs: its process, the kernel's console, and the port of the frames."""

    process: subprocess.Popen[bytes]
    console: socket.socket
    port: socket.socket


@contextmanager
def started(
    qemu: Qemu, kernel: Kernel, layers: Sequence[bytes], line: str, memory: int, processors: int
) -> Iterator[Machine]:
    """A machine with ``memory`` MiB, ``line`` as its command line and ``layers`` as its initramfs.

    Raises :class:`~guestfault.lab.errors.StorageError` if QEMU cannot be started.  The thread that
    asks has to last as long: to the kernel it is the one whose end is QEMU's end too.
    """
    with ExitStack() as stack:
        image = _memfd("initramfs", layers)
        stack.callback(os.close, image)
        console, console_inside = _pair(stack)
        port, port_inside = _pair(stack)
        command = qemu.command(memory=memory, processors=processors)
        command += ["-kernel", str(kernel.image), "-initrd", f"/proc/self/fd/{image}"]
        command += ["-append", line]
        for name, end in (("console", console_inside), ("port", port_inside)):
            command += ["-chardev", f"socket,id={name},fd={end.fileno()}"]
            command += ["-serial", f"chardev:{name}"]
        process = _spawn(
            command, qemu.environment, (image, console_inside.fileno(), port_inside.fileno())
        )
        stack.callback(_stop, process)
        console_inside.close()
        port_inside.close()
        yield Machine(process, console, port)


def _memfd(name: str, parts: Sequence[bytes]) -> int:
    with storing(f"memory for the {name}"):
        descriptor = os.memfd_create(f"guestfault-{name}", os.MFD_CLOEXEC)
        with open(descriptor, "wb", closefd=False) as file:
            for part in parts:
                file.write(part)
        return descriptor


def _pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    ours, inside = socket.socketpair()
    stack.callback(ours.close)
    stack.callback(inside.close)
    ours.setblocking(False)
    return ours, inside


def _spawn(
    command: list[str], environment: dict[str, str], descriptors: Sequence[int]
) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def die_with_us() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # too late: we are gone already
            os._exit(1)

    with storing(command[0]):
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            pass_fds=descriptors,
            start_new_session=True,
            preexec_fn=die_with_us,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
