"""Starts a kernel, runs a command in it, and brings back what came of it.

:func:`run` is all there is to it, and what it starts is gone when it returns
(:mod:`~guestfault.lab.process`).

Every end has its own error: :class:`~guestfault.lab.errors.NeverBootedError`,
:class:`~guestfault.lab.errors.KernelPanicError` (an oops is made one),
:class:`~guestfault.lab.errors.NoKvmError`, :class:`~guestfault.lab.errors.HungError`, and
:class:`~guestfault.lab.errors.EmulatorError` and :class:`~guestfault.lab.errors.InsideError` for
what is the fault of neither the kernel nor the command.
"""

from __future__ import annotations

import os
import selectors
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from guestfault.lab import console as kernel_console
from guestfault.lab.bochs import find_bochs
from guestfault.lab.errors import (
    EmulatorError,
    HungError,
    InsideError,
    KernelPanicError,
    MachineError,
    NeverBootedError,
    NoKvmError,
    TooSmallError,
)
from guestfault.lab.frames import Frame, Kind, Reader
from guestfault.lab.given import Emulator
from guestfault.lab.image import Kernel
from guestfault.lab.initramfs import Job, initramfs
from guestfault.lab.layers import DEPENDENCIES, PACKAGE, PYTHON
from guestfault.lab.modules import modules_for
from guestfault.lab.process import Machine, started
from guestfault.lab.qemu import find_qemu

__all__ = ["MEMORY", "MEMORY_WITH_NUMBA", "TIMEOUT", "Result", "run"]

MEMORY = 512
"""MiB of a machine, if nothing else is asked for."""
MEMORY_WITH_NUMBA = 1024
"""The same with numba in it, which is in memory twice while it is unpacked."""
TIMEOUT = 300.0
"""Seconds for the command."""

_KERNEL_NEEDS = 112  # MiB, beside the initramfs
_ESSENTIAL = (
    "console=ttyS0 panic=-1 oops=panic reboot=t random.trust_cpu=on "
    "8250.nr_uarts=4 PYTHONHASHSEED=0"
)
_NO_MODULES = "; it is not built in, and no modules came along (--modules DIR)"


@dataclass(slots=True)
class Result:
    """What came of a command.

    ``status`` is its exit status, 128 + N after signal N, 127 if there was no such program.
    ``files`` holds the files that were asked for by their path inside, ``missing`` why one of them
    is not there.  ``boot_seconds`` were spent until the first process, ``seconds`` in all.
    """

    status: int
    stdout: bytes
    stderr: bytes
    files: dict[str, bytes]
    missing: dict[str, str]
    console: bytes
    boot_seconds: float
    seconds: float

    @property
    def warnings(self) -> list[str]:
        """The kernel's own warnings, such as ``WARNING: CPU: 0 PID: 70 at ...``."""
        return kernel_console.warnings(self.console)


def run(
    kernel: Kernel,
    command: Sequence[str],
    *,
    npt: bool = True,
    ept: bool | None = None,
    processors: int = 1,
    memory: int | None = None,
    timeout: float = TIMEOUT,
    boot_timeout: float | None = None,
    files: Sequence[str] = (),
    added: Mapping[str, Path] | None = None,
    environment: Mapping[str, str] | None = None,
    arguments: Sequence[str] = (),
    needs_kvm: bool = True,
    numba: bool = False,
    verbose: bool = False,
    on_output: Callable[[Kind, bytes], None] | None = None,
    on_console: Callable[[bytes], None] | None = None,
    emulator: Emulator | None = None,
) -> Result:
    """Run ``command`` under ``kernel``, and wait for it.

    ``npt`` is whether KVM there uses nested page tables, or shadow ones.  That is ``kvm_amd``; with
    ``ept``, true or false, it is the same of ``kvm_intel``, on another machine, which is several
    times as slow.  ``memory`` is in MiB (:data:`MEMORY`), ``timeout`` and ``boot_timeout`` in
    seconds; the second is the machine's own if not given.  ``files`` are paths inside to bring
    back, ``added`` paths here (files, with the libraries a program needs, or directories) by the
    path that they get inside.  ``arguments`` are added to the kernel's command line; ``verbose``
    lets its console have every message, not warnings alone.

    ``on_output`` is called with ``Kind.STDOUT`` or ``Kind.STDERR`` and bytes as they come, and
    ``on_console`` with the console's.  Inside are ``python3`` with its standard library, this
    package with its dependencies, the command ``guestfault``, and nothing else: no shell.  With
    ``numba`` that is there, too, for the compiled loop; the machine then has more memory
    (:data:`MEMORY_WITH_NUMBA`) and boots longer.

    Raises a :class:`~guestfault.lab.errors.MachineError` for each way in which a machine can fail,
    :class:`~guestfault.lab.errors.NoModulesError`, :class:`~guestfault.lab.errors.StorageError`,
    :class:`~guestfault.lab.errors.CannotEmulateError`, and :class:`~guestfault.errors.Unavailable`
    without a QEMU, or for ``ept`` without a Bochs.  The calling thread has to last as long as the
    call: the emulator ends with it.
    """
    job = Job(command, files, environment or {}, added or {}, needs_kvm, numba)
    memory = memory or (MEMORY_WITH_NUMBA if numba else MEMORY)
    emulator = emulator or (find_qemu() if ept is None else find_bochs())
    modules = modules_for(kernel, emulator.module)
    layers = initramfs(modules, job)
    # The initramfs is there twice while it is unpacked, into half of the memory at most.
    least = (2 * sum(map(len, layers)) >> 20) + _KERNEL_NEEDS
    if memory < least:
        raise TooSmallError(memory, least)
    tdp = npt if ept is None else ept
    line = _command_line(emulator, tdp, verbose, arguments)
    boot_timeout = boot_timeout or emulator.boot_timeout
    began = time.monotonic()
    with started(emulator, kernel, layers, line, memory, processors) as machine:
        watch = _Watch(machine, began, timeout, boot_timeout, on_output, on_console)
        watch.no_kvm_mend = "" if modules else _NO_MODULES
        try:
            watch.follow()
        except MachineError as error:
            error.console = bytes(watch.console)
            error.stdout, error.stderr = bytes(watch.stdout), bytes(watch.stderr)
            raise
        return watch.result()


def _command_line(emulator: Emulator, tdp: bool, verbose: bool, arguments: Sequence[str]) -> str:
    # Without messages below a warning the console, which is slow, costs nothing.
    level = "ignore_loglevel" if verbose else "loglevel=5"
    words = [_ESSENTIAL, level, emulator.arguments, f"{emulator.module}.{emulator.tdp}={int(tdp)}"]
    words += [f"rdinit={PYTHON}", f"PYTHONPATH={PACKAGE}:{DEPENDENCIES}", *arguments]
    # The kernel gives what follows the dashes to its first process.
    return " ".join([*words, "--", "-S", "-m", "guestfault.lab.inside"])


# -- following -----------------------------------------------------------------------------------


@dataclass(slots=True)
class _Watch:
    """Reads what a machine says until it is done, and judges it."""

    machine: Machine
    began: float
    timeout: float
    boot_timeout: float
    on_output: Callable[[Kind, bytes], None] | None
    on_console: Callable[[bytes], None] | None
    console: bytearray = field(default_factory=bytearray)
    stdout: bytearray = field(default_factory=bytearray)
    stderr: bytearray = field(default_factory=bytearray)
    complaints: bytearray = field(default_factory=bytearray)
    files: dict[str, bytearray] = field(default_factory=dict)
    missing: dict[str, str] = field(default_factory=dict)
    no_kvm_mend: str = ""
    status: int | None = None
    booted: float | None = None
    done: bool = False
    ended: float = 0.0

    def follow(self) -> None:
        """Until the machine is done.  Raises for every other end."""
        complaints = self.machine.process.stderr
        assert complaints is not None
        reader = Reader()
        with selectors.DefaultSelector() as selector:
            selector.register(self.machine.console, selectors.EVENT_READ, self._heard)
            selector.register(self.machine.port, selectors.EVENT_READ, reader)
            selector.register(complaints, selectors.EVENT_READ, self.complaints.extend)
            while not self.done and selector.get_map():
                for key, _ in selector.select(self._left()):
                    data = _read(key.fd)
                    if not data:
                        selector.unregister(key.fileobj)
                    elif key.data is reader:
                        for frame in reader.feed(data):
                            self._told(frame)
                    else:
                        key.data(data)
        self.ended = time.monotonic()
        self._heard(_read(self.machine.console.fileno()))
        self._judge()

    def _left(self) -> float:
        """Seconds until the machine is out of time; raises if it is."""
        now = time.monotonic()
        if self.booted is None:
            limit, left = self.boot_timeout, self.began + self.boot_timeout - now
        else:
            limit, left = self.timeout, self.booted + self.timeout - now
        if left <= 0:
            last = kernel_console.last_line(self.console)
            self._raise_panic()
            raise (NeverBootedError if self.booted is None else HungError)(limit, last)
        return left

    def _heard(self, data: bytes) -> None:
        self.console += data
        if data and self.on_console:
            self.on_console(data)

    def _told(self, frame: Frame) -> None:
        match frame.kind:
            case Kind.HELLO:
                self.booted = time.monotonic()
            case Kind.STDOUT | Kind.STDERR:
                whose = self.stdout if frame.kind is Kind.STDOUT else self.stderr
                whose += frame.payload
                if self.on_output:
                    self.on_output(frame.kind, frame.payload)
            case Kind.FILE:
                path, data = frame.named()
                self.files.setdefault(path, bytearray()).extend(data)
            case Kind.MISSING:
                path, data = frame.named()
                self.files.pop(path, None)
                self.missing[path] = data.decode("utf-8", "replace")
            case Kind.STATUS:
                self.status = int(frame.text())
            case Kind.NO_KVM:
                raise NoKvmError(frame.text() + self.no_kvm_mend)
            case Kind.FAILED:
                raise InsideError(frame.text().strip())
            case Kind.DONE:
                self.done = True

    def _judge(self) -> None:
        if self.status is not None and self.done:
            return
        self._raise_panic()
        emulator, status = self.machine.emulator, self.machine.process.wait()
        said = self.complaints.decode("utf-8", "replace")
        why, restarted = emulator.last_words(said, status)
        where = "before the command had ended" if self.booted else "before the kernel had booted"
        if restarted:
            why = f"the machine restarted {where}, without a panic"
        raise EmulatorError(emulator.name, status, why or where)

    def _raise_panic(self) -> None:
        if reason := kernel_console.panic(self.console):
            raise KernelPanicError(reason, kernel_console.first_trouble(self.console))

    def result(self) -> Result:
        """What came of it, once it is done."""
        assert self.status is not None
        assert self.booted is not None
        return Result(
            self.status,
            bytes(self.stdout),
            bytes(self.stderr),
            {path: bytes(data) for path, data in self.files.items()},
            self.missing,
            bytes(self.console),
            self.booted - self.began,
            self.ended - self.began,
        )


def _read(descriptor: int) -> bytes:
    try:
        return os.read(descriptor, 1 << 16)
    except (BlockingIOError, ConnectionResetError):
        return b""
