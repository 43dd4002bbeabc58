"""What an emulator is given: everything as open files, so that there is no file to remove later.

What it reads is in memory (memfd), what it says comes through sockets or pipes; it finds them by
``/proc/self/fd`` or by number, and they are gone with the last process that has them.
"""

from __future__ import annotations

import io
import os
import socket
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from guestfault.lab.image import Kernel
from guestfault.lab.store import storing

__all__ = ["Emulator", "Given", "Said"]

Said = socket.socket | io.FileIO
"""What a machine says, to be read here without waiting."""


class Emulator(Protocol):
    """What runs a machine: QEMU, or Bochs.

    ``name`` is its name, ``module`` KVM's module for the processor that it emulates, ``tdp`` that
    module's parameter for nested page tables, ``arguments`` what a kernel on it needs to be told,
    and ``boot_timeout`` the seconds that a kernel may take to boot if nobody says otherwise.
    """

    name: ClassVar[str]
    module: ClassVar[str]
    tdp: ClassVar[str]
    arguments: ClassVar[str]
    boot_timeout: ClassVar[float]

    @property
    def environment(self) -> dict[str, str]:
        """The environment to start it in."""

    def give(
        self,
        given: Given,
        kernel: Kernel,
        layers: Sequence[bytes],
        line: str,
        memory: int,
        processors: int,
    ) -> list[str]:
        """The command line that starts a machine.  What else it is given goes into ``given``.

        The machine has ``memory`` MiB, ``line`` is the kernel's command line, ``layers`` are its
        initramfs.  Raises :class:`~guestfault.lab.errors.CannotEmulateError` for a machine that it
        cannot emulate.
        """

    def last_words(self, said: str, status: int) -> tuple[str, bool]:
        """Why it ended, out of what it ``said``, and whether the machine only restarted."""


@dataclass(slots=True)
class Given:
    """The open files of one machine; closed when ``stack`` is.

    ``descriptors`` are those that the emulator inherits, ``input`` the one that is its standard
    input, and ``console`` and ``port`` our ends of its two serial ports.
    """

    stack: ExitStack
    descriptors: list[int] = field(default_factory=list)
    input: int | None = None
    _theirs: list[int] = field(default_factory=list)
    _ours: dict[str, Said] = field(default_factory=dict)

    @property
    def console(self) -> Said:
        """Our end of the first serial port."""
        return self._ours["console"]

    @property
    def port(self) -> Said:
        """Our end of the second one."""
        return self._ours["port"]

    def memory(self, name: str, parts: Sequence[bytes]) -> int:
        """A file in memory with ``parts`` in it; its descriptor, at its beginning."""
        with storing(f"memory for the {name}"):
            descriptor = os.memfd_create(f"guestfault-{name}", os.MFD_CLOEXEC)
            self.stack.callback(os.close, descriptor)
            self.descriptors.append(descriptor)
            with open(descriptor, "wb", closefd=False) as file:
                for part in parts:
                    file.write(part)
            os.lseek(descriptor, 0, os.SEEK_SET)
        return descriptor

    def socket(self, name: str) -> int:
        """The emulator's end of a socket for ``console`` or ``port``."""
        ours, theirs = socket.socketpair()
        self.stack.callback(ours.close)
        ours.setblocking(False)
        return self._end(name, ours, theirs.detach())

    def pipe(self, name: str) -> int:
        """The same of a pipe, which can be opened by its name in ``/proc`` too."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        ours = open(reader, "rb", buffering=0)  # noqa: SIM115 - closed with the stack
        self.stack.callback(ours.close)
        os.set_blocking(reader, False)
        return self._end(name, ours, writer)

    def _end(self, name: str, ours: Said, theirs: int) -> int:
        self._ours[name] = ours
        self._theirs.append(theirs)
        self.descriptors.append(theirs)
        self.stack.callback(self.started)
        return theirs

    def started(self) -> None:
        """The emulator has its ends, and alone: when it ends, so does what we read."""
        while self._theirs:
            os.close(self._theirs.pop())
