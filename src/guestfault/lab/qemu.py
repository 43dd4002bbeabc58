"""The QEMU that runs the lab's machines: the system's if it is new enough, else one fetched here.

Version 10 is wanted.  Under 7.2 a Linux 6.12 oopses at boot now and then, around ``cmpxchg16b``
(5 of some 30 boots; none of 24 when the processor is without it, none of 24 under version 10).  So
an older QEMU is used only where a newer one cannot be had, and then without that instruction.

A fetched QEMU is a Debian package, and those it needs that this system has not, unpacked into the
lab's store: its libraries are found by ``LD_LIBRARY_PATH``, its firmware by ``-L``.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from guestfault.errors import Unavailable
from guestfault.lab.apt import PrivateApt, codename, find_mirror, unpack
from guestfault.lab.errors import LabError
from guestfault.lab.store import making_directory, store

__all__ = ["Qemu", "fetch_qemu", "find_qemu"]

_PROGRAM = "qemu-system-x86_64"
_PACKAGE = "qemu-system-x86"
_WANTED = (10, 0)
_FETCHED = "qemu"
_LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib", "lib")
_FIRMWARE = ("usr/share/qemu", "usr/share/seabios")


@dataclass(frozen=True, slots=True)
class Qemu:
    """``root`` is the directory that a fetched one was unpacked into, ``None`` for the system's."""

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
        return _environment(self.root)

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
    release = codename()
    if release is None:
        why = "packages of it are for Debian, which this system is not"
        raise Unavailable("QEMU", why, "install QEMU 10 or newer by the means of this system")
    # Its libraries come from this system's own release, or they would want another C library.
    backports = f"{release}-backports"
    apt = PrivateApt(
        store() / "apt" / f"{release}+backports", mirror or find_mirror(), [release, backports]
    )
    say(f"looking for QEMU in {release} and {backports}")
    apt.update()
    plan = apt.install_plan(_PACKAGE, backports)
    if not plan:
        raise Unavailable("QEMU", "its package is installed, and its program is not to be found")
    final = store() / _FETCHED
    with making_directory(final) as directory:
        say(f"downloading QEMU, {len(plan)} packages")
        for package in apt.download(plan, directory):
            unpack(package, directory)
            package.unlink()
        _version(directory / "usr/bin" / _PROGRAM, directory)
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
    try:
        done = subprocess.run(
            [str(program), "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            env=_environment(root),
            check=False,
        )
    except OSError as error:
        raise Unavailable(str(program), f"does not start: {error.strerror}") from error
    match = re.search(r"version (\d+)\.(\d+)(?:\.(\d+))?", done.stdout)
    if done.returncode or match is None:
        why = (done.stderr.strip().splitlines() or ["it says no version"])[-1]
        raise Unavailable(str(program), f"does not run: {why}", _mend(root))
    return tuple(int(part or 0) for part in match.groups())


def _mend(root: Path | None) -> str:
    return "" if root is None else f"remove {root} and fetch it again: guestfault lab fetch"


def _environment(root: Path | None) -> dict[str, str]:
    environment = dict(os.environ)
    if root is not None:
        ours = [str(root / directory) for directory in _LIBRARIES]
        theirs = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = ":".join(ours + ([theirs] if theirs else []))
    return environment


def _text(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))
