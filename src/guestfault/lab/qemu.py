"""The QEMU that runs the lab's machines: the system's if it is new enough, else one fetched here.

Version 10 is wanted.  Under 7.2 a Linux 6.12 oopses at boot now and then, around ``cmpxchg16b``
(5 of some 30 boots; none of 24 when the processor is without it, none of 24 under version 10).  So
an older QEMU is used only where a newer one cannot be had, and then without that instruction.

A fetched QEMU is a Debian package, and those it needs that this system has not, unpacked into the
lab's store (:mod:`~guestfault.lab.unpacked`): its firmware is found by ``-L``.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from guestfault.errors import Unavailable
from guestfault.lab.errors import LabError
from guestfault.lab.given import Given
from guestfault.lab.image import Kernel
from guestfault.lab.store import store
from guestfault.lab.unpacked import environment_of, fetch_unpacked, said_by

__all__ = ["Qemu", "fetch_qemu", "find_qemu"]

_PROGRAM = "qemu-system-x86_64"
_PACKAGE = "qemu-system-x86"
_WANTED = (10, 0)
_FETCHED = "qemu"
_FIRMWARE = ("usr/share/qemu", "usr/share/seabios")


@dataclass(frozen=True, slots=True)
class Qemu:
    """``root`` is the directory that a fetched one was unpacked into, ``None`` for the system's."""

    name: ClassVar[str] = "QEMU"
    module: ClassVar[str] = "kvm_amd"
    tdp: ClassVar[str] = "npt"
    arguments: ClassVar[str] = ""
    boot_timeout: ClassVar[float] = 90.0

    program: Path
    version: tuple[int, ...]
    root: Path | None = None

    @property
    def good(self) -> bool:
        """Whether it is new enough to be trusted with every kernel."""
        return self.version >= _WANTED

    @property
    def environment(self) -> dict[str, str]:
        """The environment to start it in."""
        return environment_of(self.root)

    def command(self, *, memory: int, processors: int) -> list[str]:
        """The command line of a machine of ``memory`` MiB, as far as it is about the machine.

        With more than one processor all are emulated by one thread: with a thread each, two vCPUs
        under nested paging hang, or see a shutdown that never was, in one run out of four.
        """
        flags = "+svm,+npt" if self.good else "+svm,+npt,-cx16"
        accelerator = "tcg" if processors == 1 else "tcg,thread=single"
        command = [str(self.program), "-machine", "q35", "-accel", accelerator]
        command += ["-cpu", f"EPYC,{flags}", "-smp", str(processors), "-m", str(memory)]
        command += ["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"]
        if self.root is not None:
            for directory in _FIRMWARE:
                command += ["-L", str(self.root / directory)]
        return command

    def give(
        self,
        given: Given,
        kernel: Kernel,
        layers: Sequence[bytes],
        line: str,
        memory: int,
        processors: int,
    ) -> list[str]:
        """See :class:`~guestfault.lab.given.Emulator`."""
        initramfs = given.memory("initramfs", layers)
        command = self.command(memory=memory, processors=processors)
        command += ["-kernel", str(kernel.image), "-initrd", f"/proc/self/fd/{initramfs}"]
        command += ["-append", line]
        for name in ("console", "port"):
            command += ["-chardev", f"socket,id={name},fd={given.socket(name)}"]
            command += ["-serial", f"chardev:{name}"]
        return command

    def last_words(self, said: str, status: int) -> tuple[str, bool]:
        """See :class:`~guestfault.lab.given.Emulator`."""
        lines = said.strip().splitlines()
        return (lines[-1] if lines else "", status == 0)


def find_qemu() -> Qemu:
    """The best that is here: a new one of the system's, a fetched one, an old one of the system's.

    Raises :class:`~guestfault.errors.Unavailable`.
    """
    candidates = [qemu for qemu in (_of_system(), _of_store()) if qemu is not None]
    if not candidates:
        why = f"no {_PROGRAM} on this system, and none has been fetched"
        raise Unavailable("QEMU", why, "guestfault lab fetch gets one, or install it")
    return next((qemu for qemu in candidates if qemu.good), candidates[0])


def fetch_qemu(*, mirror: str | None = None, say: Callable[[str], None] = lambda _: None) -> Qemu:
    """A good QEMU, fetched if there is none; the system's old one where none can be fetched.

    ``say`` is told each step.  Raises :class:`~guestfault.errors.Unavailable`, and what
    :class:`~guestfault.lab.apt.PrivateApt` raises.
    """
    old = None
    try:
        old = find_qemu()
        if old.good:
            return old
    except Unavailable:
        pass
    try:
        return _fetch(mirror, say)
    except LabError as error:
        if old is None:
            raise
        say(f"going on with QEMU {_text(old.version)}: {error}")
    except Unavailable as error:
        if old is None:
            raise
        say(f"going on with QEMU {_text(old.version)}: {error}")
    return old


def _fetch(mirror: str | None, say: Callable[[str], None]) -> Qemu:
    fetch_unpacked(
        "QEMU",
        [_PACKAGE],
        store() / _FETCHED,
        backports=True,
        works=lambda root: _version(root / "usr/bin" / _PROGRAM, root),
        mirror=mirror,
        say=say,
    )
    qemu = _of_store()
    assert qemu is not None
    say(f"QEMU {_text(qemu.version)}")
    return qemu


def _of_system() -> Qemu | None:
    found = shutil.which(_PROGRAM)
    if found is None:
        return None
    try:
        return Qemu(Path(found), _version(Path(found), None))
    except Unavailable:
        return None


def _of_store() -> Qemu | None:
    root = store() / _FETCHED
    program = root / "usr/bin" / _PROGRAM
    if not program.exists():
        return None
    return Qemu(program, _version(program, root), root)


def _version(program: Path, root: Path | None) -> tuple[int, ...]:
    """What it says of itself; raises :class:`~guestfault.errors.Unavailable` if it does not."""
    said = said_by([str(program), "--version"], root, environment_of(root))
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", said)
    if match is None:
        raise Unavailable(str(program), "it says no version")
    return tuple(int(part or 0) for part in match.groups())


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
