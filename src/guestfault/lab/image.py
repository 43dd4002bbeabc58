"""A kernel to start: its image and, where KVM is not built in, its modules.

An x86 kernel is started from a ``bzImage`` (a distribution's ``vmlinuz``), whose header
(``Documentation/arch/x86/boot.rst``) has a mark and the kernel's release.  By the release the
modules are found: those installed beside the image or on this system, or those of the tree in
which the kernel was built.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from guestfault.lab.elf import is_elf
from guestfault.lab.errors import NoModulesError, NotAKernelError
from guestfault.lab.store import storing

__all__ = ["Kernel", "open_kernel"]

_HEADER_END = 0x250
_BOOT_FLAG_AT, _BOOT_FLAG = 0x1FE, b"\x55\xaa"
_MARK_AT, _MARK = 0x202, b"HdrS"
_VERSION_AT = 0x20E  # where the release's text is, less 0x200
_TREE_IMAGE = Path("arch/x86/boot/bzImage")
_KVM = Path("arch/x86/kvm")


@dataclass(frozen=True, slots=True)
class Kernel:
    """``release`` is as ``uname -r`` will say it; ``modules`` a directory, or ``None``."""

    image: Path
    release: str
    modules: Path | None


def open_kernel(image: Path, modules: Path | None = None) -> Kernel:
    """The kernel in the file ``image``, with the modules in or below ``modules``.

    ``modules`` is what ``make modules_install`` was given as INSTALL_MOD_PATH, or a directory
    ``lib/modules/RELEASE`` itself, or a kernel tree that was built.  If not given, they are looked
    for beside the image, in the tree it was built in, and among this system's own.

    Raises :class:`~guestfault.lab.errors.NotAKernelError`,
    :class:`~guestfault.lab.errors.NoModulesError` (only for a directory that was given) and
    :class:`~guestfault.lab.errors.StorageError`.
    """
    if image.is_dir():
        if not (image / _TREE_IMAGE).exists():
            raise NotAKernelError(image, f"a directory without {_TREE_IMAGE}: build it first")
        image = image / _TREE_IMAGE
    release = _release(image)
    if modules is None:
        return Kernel(image, release, _modules_of(image, release))
    if not modules.is_dir():
        why = "not a directory" if modules.exists() else "no such directory"
        raise NoModulesError(modules, f"{why}, where the modules of {release} should be")
    return Kernel(image, release, _installed_in(modules, release) or modules)


def _release(image: Path) -> str:
    with storing(image), image.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(_HEADER_END)
        if is_elf(head):
            raise NotAKernelError(image, f"an ELF file; the image to start is {_TREE_IMAGE}")
        whole = len(head) == _HEADER_END
        if not whole or head[_BOOT_FLAG_AT:][:2] != _BOOT_FLAG or head[_MARK_AT:][:4] != _MARK:
            raise NotAKernelError(
                image, 'not an x86 kernel image: no "HdrS" where a bzImage has it'
            )
        # A protected-mode part of as many paragraphs as syssize says follows the setup sectors.
        sectors = head[0x1F1] or 4
        needed = (sectors + 1) * 512 + int.from_bytes(head[0x1F4:0x1F8], "little") * 16
        if size < needed:
            raise NotAKernelError(image, f"cut short: {size} bytes of {needed}")
        file.seek(0x200 + int.from_bytes(head[_VERSION_AT:][:2], "little"))
        words = file.read(256).split(b"\0")[0].decode("ascii", "replace").split()
    if not words:
        raise NotAKernelError(image, "its header names no release")
    return words[0]


def _modules_of(image: Path, release: str) -> Path | None:
    tree = image.absolute().parent
    for part in reversed(_TREE_IMAGE.parent.parts):
        tree = tree.parent if tree.name == part else Path("/nowhere")
    if any((tree / _KVM).glob("kvm*.ko")):
        return tree
    around = image.absolute().parent
    for root in (around, around.parent, Path("/")):
        if found := _installed_in(root, release):
            return found
    return around if around.name == release else None


def _installed_in(root: Path, release: str) -> Path | None:
    for below in ("lib/modules", "usr/lib/modules", "."):
        directory = root / below / release
        if directory.is_dir():
            return directory
    return None
