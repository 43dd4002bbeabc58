"""Starts an emulator, and sees to it that it ends.

It is given everything as open files (:mod:`~guestfault.lab.given`), so there is nothing to remove
afterwards, however the machine or this process ends.  It runs in a session of its own, where no
Ctrl-C meant for us reaches it; it is killed when the ``with`` block ends in any way, and the kernel
kills it if this process is killed.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from guestfault.lab.given import Emulator, Given, Said
from guestfault.lab.image import Kernel
from guestfault.lab.store import storing

__all__ = ["Machine", "started"]

_PR_SET_PDEATHSIG = 1
_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(slots=True)
class Machine:
    """A machine that runs: its emulator's process, the kernel's console, the port of the frames."""

    emulator: Emulator
    process: subprocess.Popen[bytes]
    console: Said
    port: Said


@contextmanager
def started(
    emulator: Emulator,
    kernel: Kernel,
    layers: Sequence[bytes],
    line: str,
    memory: int,
    processors: int,
) -> Iterator[Machine]:
    """A machine with ``memory`` MiB, ``line`` as its command line and ``layers`` as its initramfs.

    Raises :class:`~guestfault.lab.errors.StorageError` if the emulator cannot be started, and
    :class:`~guestfault.lab.errors.CannotEmulateError` for what it cannot emulate.  The thread that
    asks has to last as long: to the kernel it is the one whose end is the emulator's end too.
    """
    with ExitStack() as stack:
        given = Given(stack)
        command = emulator.give(given, kernel, layers, line, memory, processors)
        process = _spawn(command, emulator.environment, given)
        stack.callback(_stop, process)
        given.started()
        yield Machine(emulator, process, given.console, given.port)


def _spawn(
    command: list[str], environment: dict[str, str], given: Given
) -> subprocess.Popen[bytes]:
    parent = os.getpid()

    def die_with_us() -> None:
        _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
        if os.getppid() != parent:  # too late: we are gone already
            os._exit(1)

    with storing(command[0]):
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if given.input is None else given.input,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            env=environment,
            pass_fds=given.descriptors,
            start_new_session=True,
            preexec_fn=die_with_us,
        )


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    assert process.stderr is not None
    process.stderr.close()
