"""Debian packages for the lab: apt and dpkg, used beside the system and not on it.

apt can be told to keep everything - its list of sources, the lists of packages, what it downloads -
in directories of ours.  So a suite that the system does not use can be asked for a package, by
any user, without a line in ``/etc/apt`` changing and with apt's own checks of signatures; and
``dpkg -x`` unpacks a package without installing it.

The mirror is the one that the system itself uses: whatever lies behind its sources (a company's
cache, a proxy) is used here as well.  Where they name no Debian mirror, as on Ubuntu, the user
has to.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

from guestfault.errors import Unavailable
from guestfault.lab.errors import FetchError, StorageError
from guestfault.lab.store import storing

__all__ = ["PrivateApt", "codename", "find_mirror", "unpack"]

_KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
_CODENAMES = ("bullseye", "bookworm", "trixie", "forky", "sid")
_ALIASES = ("oldoldstable", "oldstable", "stable", "testing", "unstable")
_FRESH = 24 * 3600.0
_FULL = "No space left on device"
_DPKG_STATUS = Path("/var/lib/dpkg/status")

# Hooks of the system's (clearing /var/cache/apt, say) are for the system's own updates.
_CONFIGURATION = """\
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
Dir::State "{root}";
Dir::State::status "{status}";
Dir::Cache "{root}/cache";
Dir::Etc::sourcelist "{root}/sources.list";
Dir::Etc::sourceparts "{root}/none";
Dir::Etc::preferences "{root}/none/none";
Dir::Etc::preferencesparts "{root}/none";
Acquire::Languages "none";
Acquire::Retries "2";
APT::Update::Error-Mode "any";
APT::Sandbox::User "{user}";
APT::Get::List-Cleanup "true";
"""


def find_mirror() -> str:
    """The URI of the Debian archive that this system's own apt sources name.

    Asks apt, which knows every form that sources are written in; nothing is downloaded.  Raises
    :class:`~guestfault.errors.Unavailable`.
    """
    uris = _apt(["apt-get", "update", "--print-uris"], "read the apt sources")
    for base, suite in re.findall(r"^'(\S+?)/dists/([^/']+)/InRelease'", uris, re.MULTILINE):
        release = suite.removesuffix("-updates").removesuffix("-backports")
        if release in _CODENAMES + _ALIASES:
            return str(base)
    raise Unavailable(
        "a Debian mirror",
        "this system's apt sources name none",
        "name one: --mirror URI, its directory that holds dists/",
    )


def codename() -> str | None:
    """The Debian release that this system is, such as ``bookworm``; ``None`` if it is none."""
    try:
        system = platform.freedesktop_os_release()
    except OSError:
        return None
    return system.get("VERSION_CODENAME") if system.get("ID") == "debian" else None


class PrivateApt:
    """apt, with the ``suites`` of ``mirror`` alone, and with all its state in ``root``.

    Raises :class:`~guestfault.errors.Unavailable` without apt-get, and
    :class:`~guestfault.lab.errors.FetchError` or
    :class:`~guestfault.lab.errors.StorageError` where apt-get fails.
    """

    def __init__(self, root: Path, mirror: str, suites: Sequence[str]) -> None:
        self._root = root
        self._suites = tuple(suites)
        signed = f" signed-by={_KEYRING}" if _KEYRING.exists() else ""
        sources = [f"deb [target=Packages{signed}] {mirror} {suite} main\n" for suite in suites]
        with storing(root):
            (root / "lists" / "partial").mkdir(parents=True, exist_ok=True)
            (root / "cache" / "archives" / "partial").mkdir(parents=True, exist_ok=True)
            (root / "none").mkdir(exist_ok=True)
            before = self._read("sources.list")
            if before != "".join(sources):
                (root / "updated").unlink(missing_ok=True)
            # Without dpkg's list (another distribution's apt) nothing counts as installed.
            status = _DPKG_STATUS if _DPKG_STATUS.exists() else root / "status"
            (root / "status").touch()
            (root / "sources.list").write_text("".join(sources))
            # Downloading as another user would keep root's apt out of a private directory.
            user = "root" if os.geteuid() == 0 else ""
            text = _CONFIGURATION.format(root=root, status=status, user=user)
            (root / "apt.conf").write_text(text)

    def _read(self, name: str) -> str:
        try:
            return (self._root / name).read_text()
        except FileNotFoundError:
            return ""

    def update(self, *, older_than: float = _FRESH) -> None:
        """Get the lists of packages, unless they are younger than ``older_than`` seconds."""
        stamp = self._root / "updated"
        if stamp.exists() and time.time() - stamp.stat().st_mtime < older_than:
            return
        suites = " and ".join(self._suites)
        self._run(["apt-get", "update", "-qq"], f"get the list of {suites}")
        with storing(stamp):
            stamp.touch()

    def names(self, prefix: str) -> list[str]:
        """The names of all packages that begin with ``prefix``."""
        return self._run(["apt-cache", "pkgnames", prefix], "list packages").split()

    def install_plan(self, packages: Sequence[str], suite: str) -> list[str]:
        """What installing ``packages`` here would bring, themselves too, as ``name=version``."""
        command = ["apt-get", "--simulate", "--no-install-recommends", "-t", suite]
        told = self._run([*command, "install", *packages], f"find what {packages[0]} needs")
        plan = re.findall(r"^Inst (\S+) (?:\[[^\]]*\] )?\((\S+)", told, re.MULTILINE)
        return [f"{name}={version}" for name, version in plan]

    def download(self, packages: Sequence[str], into: Path) -> list[Path]:
        """Download packages, named as they are or as ``name=version``; their files."""
        self._run(["apt-get", "download", "-q", *packages], f"download {packages[-1]}", into)
        return sorted(into.glob("*.deb"))

    def _run(self, command: list[str], what: str, directory: Path | None = None) -> str:
        program, *rest = command
        return _apt([program, "-c", str(self._root / "apt.conf"), *rest], what, directory)


def unpack(package: Path, into: Path) -> None:
    """Unpack a .deb file's files into a directory; nothing of it is run or installed."""
    _run(["dpkg", "-x", str(package), str(into)], f"unpack {package.name}")


def _apt(command: list[str], what: str, directory: Path | None = None) -> str:
    if shutil.which(command[0]) is None:
        why = f"no {command[0]} on this system"
        mend = "it fetches Debian packages; elsewhere name a kernel's own files: --kernel PATH"
        raise Unavailable("apt", why, mend)
    return _run(command, what, directory)


def _run(command: list[str], what: str, directory: Path | None = None) -> str:
    """Run a program to its end; its standard output.  Its first error line, if it fails."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            cwd=directory,
            env={**os.environ, "LC_ALL": "C.UTF-8"},
            check=False,
        )
    except FileNotFoundError:
        raise Unavailable(command[0], "not on this system") from None
    if done.returncode:
        if _FULL in done.stderr:
            import errno

            raise StorageError(directory or "the lab's store", errno.ENOSPC, f"{_FULL}: {what}")
        raise FetchError(f"cannot {what}", _first_error(done.stderr, done.returncode))
    return done.stdout


def _first_error(text: str, status: int) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if line.startswith(("E:", "Err:", "W:", "dpkg"))] or lines
    errors.sort(key=lambda line: not line.startswith("E:"))
    return errors[0].removeprefix("E: ") if errors else f"exit status {status}, without a word"
