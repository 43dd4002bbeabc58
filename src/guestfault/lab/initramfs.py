"""Everything that a machine has in it, as the initramfs its kernel is started with.

Layers, one behind the other (:mod:`~guestfault.lab.cpio`): Python and its libraries, which stay the
same from run to run, numba if it was asked for, this package, KVM's modules, the files and the job
of this one run.

They are not compressed.  An emulated processor takes longer to unpack them than QEMU takes to hand
them over, and to the kernel they are the same.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from guestfault.lab.cpio import Archive
from guestfault.lab.elf import is_elf
from guestfault.lab.inside import JOB, MODULES
from guestfault.lab.layers import (
    DEPENDENCIES,
    PACKAGE,
    libraries,
    numba_layer,
    package_layer,
    python_layer,
)
from guestfault.lab.modules import Module
from guestfault.lab.store import storing

__all__ = ["Job", "initramfs"]

_DIRECTORIES = ("/proc", "/sys", "/dev", "/run", "/root")
_PATH = "/usr/local/bin:/usr/bin:/bin:/usr/sbin:/sbin"


@dataclass(frozen=True, slots=True)
class Job:
    """What is to be done inside.

    ``files`` are paths inside to be brought back, ``added`` paths here by the path inside that they
    get.  ``numba``: whether it comes along.
    """

    command: Sequence[str]
    files: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    added: Mapping[str, Path] = field(default_factory=dict)
    needs_kvm: bool = True
    numba: bool = False

    def as_json(self) -> bytes:
        """As :mod:`~guestfault.lab.inside` reads it."""
        environment = {
            "PATH": _PATH,
            "HOME": "/root",
            "TERM": "dumb",
            "LANG": "C.UTF-8",
            "PYTHONPATH": f"{PACKAGE}:{DEPENDENCIES}",
            "PYTHONDONTWRITEBYTECODE": "1",
            "PYTHONUNBUFFERED": "1",  # what was written before a panic is worth most
            **self.environment,
        }
        document = {
            "command": list(self.command),
            "files": list(self.files),
            "environment": environment,
            "needs_kvm": self.needs_kvm,
        }
        return json.dumps(document).encode()


def initramfs(modules: Sequence[Module], job: Job) -> list[bytes]:
    """The layers, in order; one after the other they are the initramfs.

    Raises :class:`~guestfault.errors.Unavailable` if this machine's Python, or an added program,
    cannot go inside, and :class:`~guestfault.lab.errors.StorageError`.
    """
    run = Archive()
    for directory in _DIRECTORIES:
        run.directory(directory)
    run.character_device("/dev/console", 5, 1)
    for number, module in enumerate(modules):
        run.file(f"{MODULES}/{number:02}-{module.name}.ko", module.data)
    for inside, path in job.added.items():
        _add(run, path, inside)
    run.file(JOB, job.as_json())
    compiler = [numba_layer()] if job.numba else []
    return [python_layer(), *compiler, package_layer(), bytes(run)]


def _add(archive: Archive, path: Path, inside: str) -> None:
    """A file, with the libraries it needs if it is a program, or all that is in a directory."""
    with storing(path):
        if path.is_dir():
            for below in sorted(path.rglob("*")):
                if below.is_file():
                    _add(archive, below, f"{inside}/{below.relative_to(path)}")
            return
        data = path.read_bytes()
        mode = 0o755 if os.access(path, os.X_OK) else 0o644
    archive.file(inside, data, mode=mode)
    if is_elf(data) and mode == 0o755:
        for library in libraries(path.resolve()):
            with storing(library):
                archive.file(str(library), library.read_bytes(), mode=0o755)
