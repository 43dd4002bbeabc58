"""Programs out of Debian packages that are unpacked and not installed: fetched, and run.

A program comes with the packages that it needs and this system has not, from this system's own
release, or they would want another C library.  All are unpacked into one directory of the lab's
store; the libraries in there are found by ``LD_LIBRARY_PATH``.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from guestfault.errors import Unavailable
from guestfault.lab.apt import PrivateApt, codename, find_mirror, unpack
from guestfault.lab.store import making_directory, store

__all__ = ["environment_of", "fetch_unpacked", "said_by"]

_LIBRARIES = ("usr/lib/x86_64-linux-gnu", "lib/x86_64-linux-gnu", "usr/lib", "lib")


def fetch_unpacked(
    name: str,
    packages: Sequence[str],
    final: Path,
    *,
    backports: bool,
    works: Callable[[Path], object],
    mirror: str | None,
    say: Callable[[str], None],
) -> None:
    """Fetch ``packages`` and what they need here into the directory ``final``.

    ``works`` is called with the directory before it counts, and raises if it does not.  ``name`` is
    for whoever reads what ``say`` is told.  Raises :class:`~guestfault.errors.Unavailable`, and
    what :class:`~guestfault.lab.apt.PrivateApt` raises.
    """
    release = codename()
    if release is None:
        why = "packages of it are for Debian, which this system is not"
        raise Unavailable(name, why, f"install {name} by the means of this system")
    suites = [release, f"{release}-backports"] if backports else [release]
    root = store() / "apt" / (f"{release}+backports" if backports else release)
    apt = PrivateApt(root, mirror or find_mirror(), suites)
    say(f"looking for {name} in {' and '.join(suites)}")
    apt.update()
    plan = apt.install_plan(packages, suites[-1])
    if not plan:
        raise Unavailable(name, "its package is installed, and its program is not to be found")
    with making_directory(final) as directory:
        say(f"downloading {name}, {len(plan)} packages")
        for package in apt.download(plan, directory):
            unpack(package, directory)
            package.unlink()
        works(directory)


def environment_of(root: Path | None) -> dict[str, str]:
    """This environment, in which programs below ``root`` find their libraries."""
    environment = dict(os.environ)
    if root is not None:
        ours = [str(root / directory) for directory in _LIBRARIES]
        theirs = environment.get("LD_LIBRARY_PATH")
        environment["LD_LIBRARY_PATH"] = ":".join(ours + ([theirs] if theirs else []))
    return environment


def said_by(command: Sequence[str], root: Path | None, environment: dict[str, str]) -> str:
    """What a program says on standard output; raises :class:`Unavailable` if it does not run."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            env=environment,
            check=False,
        )
    except OSError as error:
        raise Unavailable(command[0], f"does not start: {error.strerror}") from error
    if done.returncode:
        why = (done.stderr.strip().splitlines() or ["it says nothing"])[-1]
        mend = "" if root is None else f"remove {root} and fetch it again: guestfault lab fetch"
        raise Unavailable(command[0], f"does not run: {why}", mend)
    return done.stdout + done.stderr
