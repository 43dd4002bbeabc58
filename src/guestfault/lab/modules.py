"""KVM's modules and what they need, in the order in which they are to be loaded.

``depmod`` writes that order down when a kernel is *installed*; a package that was only unpacked, or
a tree that was only built, has no such file.  But every module says itself what it needs, in its
``.modinfo`` section, so the order is worked out from there, and is right for all of them.

They are unpacked here, not inside, where it would take an emulated processor longer.
"""

from __future__ import annotations

import gzip
import lzma
import os
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import NamedTuple

from guestfault.errors import Unavailable
from guestfault.lab.elf import is_elf, modinfo
from guestfault.lab.errors import NoModulesError
from guestfault.lab.image import Kernel
from guestfault.lab.store import storing

__all__ = ["VENDORS", "Module", "all_modules", "modules_for"]

VENDORS = ("kvm_amd", "kvm_intel")
"""The modules that give ``/dev/kvm``, each on its processors."""

_SUFFIXES = (".ko", ".ko.xz", ".ko.gz", ".ko.zst")


class Module(NamedTuple):
    """A module's name, with underscores, and its unpacked file."""

    name: str
    data: bytes


def modules_for(kernel: Kernel, wanted: str) -> list[Module]:
    """``wanted`` and all that it needs, each after what it needs itself.

    Empty if the kernel has no modules directory, or one that lists ``wanted`` as built in: whether
    such a kernel has it is seen when it runs.  Raises
    :class:`~guestfault.lab.errors.NoModulesError` if the directory has it not, has not all that it
    needs, or is of another kernel.
    """
    directory = kernel.modules
    if directory is None:
        return []
    with storing(directory):
        files, builtin = _files(directory), _builtin(directory)
    order: dict[str, bytes] = {}

    def visit(name: str, needed_by: str) -> None:
        if name in order or name in builtin:
            return
        path = files.get(name)
        if path is None:
            needs = f"no module {name}" + (f", which {needed_by} needs" if needed_by else "")
            raise NoModulesError(directory, needs)
        data = _unpacked(path)
        said = modinfo(data)
        _check_release(path, said, kernel)
        for other in said.get("depends", "").split(","):
            if other:
                visit(_name(other), name)
        order[name] = data

    visit(wanted, "")
    return [Module(name, data) for name, data in order.items()]


def all_modules(kernel: Kernel) -> list[Module]:
    """The same for each of :data:`VENDORS` that the kernel has; it must have one."""
    there: set[str] = set()
    if kernel.modules is not None:
        with storing(kernel.modules):
            there = set(_files(kernel.modules)) & set(VENDORS)
    wanted = [vendor for vendor in VENDORS if vendor in there] or VENDORS[:1]
    return list(dict.fromkeys(module for one in wanted for module in modules_for(kernel, one)))


def _files(directory: Path) -> dict[str, Path]:
    found: dict[str, Path] = {}
    # Neither a build tree's documentation nor an installed one's link back to its sources.
    for where, below, files in os.walk(directory):
        below[:] = [name for name in below if name not in ("Documentation", ".git", "build")]
        for file in files:
            stem, dot, suffix = file.partition(".")
            if dot + suffix in _SUFFIXES:
                found.setdefault(_name(stem), Path(where, file))
    return found


def _builtin(directory: Path) -> set[str]:
    try:
        listed = (directory / "modules.builtin").read_text().split()
    except FileNotFoundError:
        return set()
    return {_name(Path(line).name.removesuffix(".ko")) for line in listed}


def _name(text: str) -> str:
    return text.replace("-", "_")  # as the kernel itself calls it


def _check_release(path: Path, said: dict[str, str], kernel: Kernel) -> None:
    built_for = said.get("vermagic", "").split(" ")[0]
    if built_for != kernel.release:
        whose = f"of {built_for}" if built_for else "not a kernel module"
        raise NoModulesError(path, f"{whose}, and the kernel is {kernel.release}")


def _unpacked(path: Path) -> bytes:
    with storing(path):
        data = path.read_bytes()
    try:
        match path.suffix:
            case ".xz":
                data = lzma.decompress(data)
            case ".gz":
                data = gzip.decompress(data)
            case ".zst":
                data = _zstd(path)
    except (lzma.LZMAError, EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise NoModulesError(path, f"cannot be unpacked: {error}") from error
    if not is_elf(data):
        raise NoModulesError(path, "not a kernel module")
    return data


def _zstd(path: Path) -> bytes:
    program = shutil.which("zstd")
    if program is None:
        why = f"not on this system, and {path.name} is compressed with it"
        raise Unavailable("zstd", why, "install the package zstd")
    done = subprocess.run([program, "-dcq", str(path)], capture_output=True, check=False)
    if done.returncode:
        why = done.stderr.decode("utf-8", "replace").strip()
        raise NoModulesError(path, f"cannot be unpacked: {why}")
    return done.stdout
