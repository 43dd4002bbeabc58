"""The Bochs that runs the lab's machines with VMX: ``kvm_intel``, with and without EPT.

QEMU's software emulation has SVM alone.  Bochs emulates Intel's processors in every detail that a
hypervisor asks for, and one instruction at a time: several times as slowly.  It starts disks, not
kernels, so it is given one that :mod:`~guestfault.lab.boot_disk` makes.

Its second is so many instructions, :data:`PER_SECOND`, whatever time they take here: what runs
inside sees a steady processor, however busy this one is, and its timeouts mean the same everywhere.

A fetched Bochs is a Debian package, unpacked into the lab's store
(:mod:`~guestfault.lab.unpacked`).  It needs a display even if nobody looks: the one for terminals,
which brings its own terminal, is small and opens no port.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from guestfault.errors import Unavailable
from guestfault.lab.boot_disk import CYLINDER, boot_disk
from guestfault.lab.errors import CannotEmulateError
from guestfault.lab.given import Given
from guestfault.lab.image import Kernel
from guestfault.lab.store import store, storing
from guestfault.lab.unpacked import environment_of, fetch_unpacked, said_by

__all__ = ["PER_SECOND", "Bochs", "fetch_bochs", "find_bochs"]

PER_SECOND = 50_000_000
"""Instructions of an emulated second; about as many as one of ours has here."""

_CPU = "corei7_haswell_4770"
_PROGRAMS = ("bochs-bin", "bochs")
_PACKAGES = ("bochs", "bochs-term")  # the second is a display, and keeps a larger one away
_FETCHED = "bochs"
_PLUGINS, _SHARE = "usr/lib/x86_64-linux-gnu/bochs/plugins", "usr/share/bochs"
_DISPLAY = "libbx_term_gui.so"
_MOST_MEMORY = 2048
_ACPI_TABLES = 0x10000  # the firmware puts them at the end of memory
_TRIPLE_FAULT = "3rd"

_CONFIGURATION = """\
display_library: term
memory: guest={memory}, host={memory}
romimage: file=$BXSHARE/BIOS-bochs-latest
vgaromimage: file=$BXSHARE/VGABIOS-lgpl-latest
cpu: model={cpu}, count=1, ips={per_second}, reset_on_triple_fault=0, ignore_bad_msrs=1
clock: sync=none, time0=utc
ata0: enabled=1, ioaddr1=0x1f0, ioaddr2=0x3f0, irq=14
ata0-master: type=disk, path="{disk}", mode=flat, cylinders={cylinders}, heads=16, spt=63
boot: disk
com1: enabled=1, mode=file, dev={console}
com2: enabled=1, mode=file, dev={port}
plugin_ctrl: speaker=0, parallel=0, gameport=0
log: /dev/null
panic: action=fatal
error: action=ignore
info: action=ignore
debug: action=ignore
"""


@dataclass(frozen=True, slots=True)
class Bochs:
    """``root`` is the directory that a fetched one was unpacked into, ``None`` for the system's."""

    name: ClassVar[str] = "Bochs"
    module: ClassVar[str] = "kvm_intel"
    tdp: ClassVar[str] = "ept"
    # Its one processor says that it shares a package with others; Linux warns of that at each boot.
    arguments: ClassVar[str] = "clearcpuid=ht"
    boot_timeout: ClassVar[float] = 300.0

    program: Path
    version: tuple[int, ...]
    root: Path | None = None

    @property
    def environment(self) -> dict[str, str]:
        """The environment to start it in."""
        environment = environment_of(self.root)
        environment["TERM"] = "dumb"
        if self.root is not None:
            environment["LTDL_LIBRARY_PATH"] = str(self.root / _PLUGINS)
            environment["BXSHARE"] = str(self.root / _SHARE)
        return environment

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
        if processors != 1:
            raise CannotEmulateError(self.name, f"one processor, not {processors}")
        if memory > _MOST_MEMORY:
            raise CannotEmulateError(self.name, f"at most {_MOST_MEMORY} MiB, not {memory}")
        with storing(kernel.image):
            image = kernel.image.read_bytes()
        disk = boot_disk(image, layers, line, memory=memory << 20, tables=_ACPI_TABLES)
        text = _CONFIGURATION.format(
            memory=memory,
            cpu=_CPU,
            per_second=PER_SECOND,
            disk=_path(given.memory("disk", disk)),
            cylinders=sum(map(len, disk)) // CYLINDER,
            console=_path(given.pipe("console")),
            port=_path(given.pipe("port")),
        )
        # One that was built with its debugger, as Debian's is, asks first: "c" is to go on.
        given.input = given.memory("answer", [b"c\n"])
        configuration = given.memory("configuration", [text.encode()])
        return [str(self.program), "-q", "-f", _path(configuration)]

    def last_words(self, said: str, status: int) -> tuple[str, bool]:
        """See :class:`~guestfault.lab.given.Emulator`."""
        match = re.search(r"following message:\n(.*)", said)
        why = re.sub(r"^\[\w+\s*\] ", "", match[1].strip()) if match else ""
        return why, _TRIPLE_FAULT in why


def find_bochs() -> Bochs:
    """The system's, or a fetched one.  Raises :class:`~guestfault.errors.Unavailable`."""
    for found in (_of_system(), _of_store()):
        if found is not None:
            return found
    why = "none on this system that emulates VMX without a window, and none has been fetched"
    raise Unavailable("Bochs", why, "guestfault lab fetch --bochs gets one")


def fetch_bochs(*, mirror: str | None = None, say: Callable[[str], None] = lambda _: None) -> Bochs:
    """One that serves, fetched if there is none.

    ``say`` is told each step.  Raises :class:`~guestfault.errors.Unavailable`, and what
    :class:`~guestfault.lab.apt.PrivateApt` raises.
    """
    try:
        return find_bochs()
    except Unavailable:
        pass
    fetch_unpacked(
        "Bochs",
        _PACKAGES,
        store() / _FETCHED,
        backports=False,
        works=lambda root: _opened(_program(root), root),
        mirror=mirror,
        say=say,
    )
    bochs = _of_store()
    assert bochs is not None
    say(f"Bochs {'.'.join(map(str, bochs.version))}")
    return bochs


def _path(descriptor: int) -> str:
    return f"/proc/self/fd/{descriptor}"


def _program(root: Path) -> Path:
    return root / "usr/bin" / _PROGRAMS[0]


def _of_system() -> Bochs | None:
    for name in _PROGRAMS:
        if found := shutil.which(name):
            try:
                return _opened(Path(found), None)
            except Unavailable:
                pass
    return None


def _of_store() -> Bochs | None:
    root = store() / _FETCHED
    return _opened(_program(root), root) if _program(root).exists() else None


def _opened(program: Path, root: Path | None) -> Bochs:
    """Raises :class:`~guestfault.errors.Unavailable` if it does not run, or lacks what it takes."""
    unchecked = Bochs(program, (), root)
    said = said_by([str(program), "--help", "cpu"], root, unchecked.environment)
    version = re.search(r"Bochs x86 Emulator (\d+)\.(\d+)", said)
    plugins = re.search(r"LTDL_LIBRARY_PATH (?:not set|is set).* '(.*)'", said)
    if version is None or _CPU not in said:
        raise Unavailable(str(program), f"it has no {_CPU}")
    if plugins is None or not Path(plugins[1], _DISPLAY).exists():
        raise Unavailable(str(program), "it has no display for terminals", "install bochs-term")
    return Bochs(program, tuple(map(int, version.groups())), root)
