"""Kernels by name: Debian's, fetched once and found again, and built ones that were added.

A name is the beginning of a version, ``6.12`` or ``7.3.4``, and means the newest such kernel of
the ``cloud`` flavour, the smallest; or it is the name of a package, ``linux-image-...``, or what
follows that prefix, and means exactly that one.

A kernel comes in one package, or, in the newer ones, in several: ``linux-image-*`` is empty there,
the image is in ``linux-binary-*`` (under ``lib/modules``), the modules are in ``linux-modules-*``.

A built kernel needs no name: its path is one.  One that is *added* has its release for a name, and
is there when the tree it came from is built anew, or gone.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from guestfault.lab.apt import PrivateApt, find_mirror, unpack
from guestfault.lab.errors import FetchError, NotAKernelError, StorageError, UnknownKernelError
from guestfault.lab.image import Kernel, open_kernel
from guestfault.lab.modules import all_modules
from guestfault.lab.store import making_directory, store

__all__ = ["SUITES", "add_kernel", "choose", "fetch_kernel", "fetched", "find_kernel"]

SUITES = ("bookworm-backports", "trixie-backports", "trixie", "bookworm")
"""Where a kernel is looked for, in this order: first the suites whose lists are short."""

_IMAGE, _BINARY, _MODULES = "linux-image-", "linux-binary-", "linux-modules-"
_CLOUD = "-cloud-amd64"


def _silent(_text: str) -> None: ...


def fetched() -> list[Kernel]:
    """The kernels that are here, oldest version first."""
    found = []
    for directory in sorted((store() / "kernels").glob("[!.]*"), key=lambda p: _order(p.name)):
        image = _image(directory, directory.name)
        if image is not None:
            has_modules = any((directory / lib).is_dir() for lib in ("lib", "usr/lib"))
            found.append(open_kernel(image, directory if has_modules else None))
    return found


def find_kernel(name: str, modules: Path | None = None) -> Kernel:
    """The kernel in a file, if ``name`` has a slash or is one; else the fetched one of that name.

    Raises :class:`~guestfault.lab.errors.UnknownKernelError` if it has not been fetched, and what
    :func:`~guestfault.lab.image.open_kernel` raises.
    """
    if "/" in name or Path(name).exists():
        return open_kernel(Path(name), modules)
    here = {kernel.release: kernel for kernel in fetched()}
    release = choose(name, list(here))
    if release is None:
        have = f"here are {', '.join(here)}" if here else "none has been fetched yet"
        raise UnknownKernelError(name, f"not here ({have}); guestfault lab fetch {name}")
    kernel = here[release]
    return kernel if modules is None else open_kernel(kernel.image, modules)


def add_kernel(kernel: Kernel) -> Kernel:
    """Copy a kernel's image, and of its modules KVM's, to where it is found by its release.

    One of the same release that is there gives way.  Raises
    :class:`~guestfault.lab.errors.NoModulesError` as a run of it would,
    :class:`~guestfault.lab.errors.NotAKernelError` for a release that is no name, and
    :class:`~guestfault.lab.errors.StorageError`.
    """
    release = kernel.release
    if "/" in release or release.startswith("."):
        raise NotAKernelError(kernel.image, f"its release, {release!r}, is no name for a directory")
    modules = all_modules(kernel)
    with making_directory(store() / "kernels" / release) as directory:
        image = directory / "boot" / f"vmlinuz-{release}"
        image.parent.mkdir()
        shutil.copyfile(kernel.image, image)
        if modules:
            into = directory / "lib" / "modules" / release
            into.mkdir(parents=True)
        for module in modules:
            (into / f"{module.name}.ko").write_bytes(module.data)
    return find_kernel(release)


def fetch_kernel(
    name: str,
    *,
    mirror: str | None = None,
    suites: Sequence[str] = SUITES,
    say: Callable[[str], None] = _silent,
) -> Kernel:
    """The kernel of that name, fetched if it is not here yet.

    ``say`` is told each step.  Raises :class:`~guestfault.lab.errors.UnknownKernelError` if no
    suite has it, and what :class:`~guestfault.lab.apt.PrivateApt` raises.
    """
    try:
        return find_kernel(name)
    except UnknownKernelError:
        pass
    mirror = mirror or find_mirror()
    unreachable: list[str] = []
    lacking: list[str] = []
    for suite in suites:
        apt = PrivateApt(store() / "apt" / suite, mirror, [suite])
        say(f"looking for {name} in {suite}")
        try:
            apt.update()
        except StorageError:
            raise
        except FetchError as error:
            unreachable.append(f"{suite} ({error.why})")
            continue
        names = apt.names("linux-")
        there = {_release(package) for package in names if _is_image(package)}
        release = choose(name, sorted(there & _whole(set(names))))
        if release is not None:
            return _fetch(apt, release, set(names), say)
        if (broken := choose(name, sorted(there))) is not None:
            lacking.append(f"{suite} has {broken} without its modules")
    why = f"not in {', '.join(suites)} at {mirror}"
    if unreachable:
        why += f"; not reachable: {', '.join(unreachable)}"
    if lacking:
        why += f"; {', '.join(lacking)}"
    raise UnknownKernelError(name, why)


def _fetch(apt: PrivateApt, release: str, names: set[str], say: Callable[[str], None]) -> Kernel:
    split = _BINARY + release in names
    packages = [_BINARY + release, _MODULES + release] if split else [_IMAGE + release]
    final = store() / "kernels" / release
    with making_directory(final) as directory:
        say(f"downloading {' and '.join(packages)}")
        for package in apt.download(packages, directory):
            unpack(package, directory)
            package.unlink()
        image = _image(directory, release)
        if image is None:
            raise FetchError(f"cannot use {packages[0]}", "there is no kernel image in it")
        all_modules(open_kernel(image, directory))  # is KVM in it?
    return find_kernel(release)


def _image(directory: Path, release: str) -> Path | None:
    at = [f"boot/vmlinuz-{release}"]
    at += [f"{usr}lib/modules/{release}/vmlinuz" for usr in ("usr/", "")]
    return next((directory / path for path in at if (directory / path).is_file()), None)


def _whole(names: set[str]) -> set[str]:
    """The releases of which every part is there: a mirror keeps an old one's image alone."""
    releases = {_release(name) for name in names if _is_image(name)}
    return {r for r in releases if _BINARY + r not in names or _MODULES + r in names}


def _is_image(package: str) -> bool:
    return re.fullmatch(_IMAGE + r"\d.*-amd64", package) is not None


def _release(package: str) -> str:
    return package.removeprefix(_IMAGE)


def choose(name: str, releases: Sequence[str]) -> str | None:
    """Which of ``releases`` a name means; ``None`` if none."""
    exact = _release(name)
    if exact in releases:
        return exact
    if not re.fullmatch(r"\d+(\.\d+)*", name):
        return None
    begins = [
        release
        for release in releases
        if release.endswith(_CLOUD) and re.match(re.escape(name) + r"(?!\d)", release)
    ]
    return max(begins, key=_order, default=None)


def _order(release: str) -> list[int]:
    version = re.sub(r"(-cloud|-rt)?-amd64$", "", release)
    return [int(number) for number in re.findall(r"\d+", version)]
