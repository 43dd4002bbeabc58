"""The lab's files: everything it keeps is in one directory, and nothing there is ever half made.

``$XDG_CACHE_HOME/guestfault/lab`` (``~/.cache/guestfault/lab``) holds fetched kernels, the fetched
QEMU and Bochs, apt's private state and prepared layers.  All of it can be deleted at any time, and
is fetched or made again when it is next asked for.

What is made there is made under a name of its own and renamed when it is whole, so that an
interrupted download, a full disk or two runs at once leave either all of a thing or nothing.  Who
makes something holds the store's lock; whatever a dead process left half made is then nobody's,
and the next to hold the lock removes it.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guestfault.lab.errors import StorageError

__all__ = ["making_directory", "store", "storing", "write_file"]

_HALF_MADE = ".half-made-"


def store() -> Path:
    """The directory; it need not exist yet."""
    base = os.environ.get("XDG_CACHE_HOME", "")
    # The XDG specification: a relative one is to be ignored.
    root = Path(base) if os.path.isabs(base) else Path.home() / ".cache"
    return root / "guestfault" / "lab"


@contextmanager
def storing(path: Path | str) -> Iterator[None]:
    """Tell an :class:`OSError` at work on ``path`` as a :class:`StorageError`: one clear line."""
    try:
        yield
    except OSError as error:
        where = error.filename if isinstance(error.filename, str) else path
        raise StorageError(where, error.errno or 0, error.strerror or str(error)) from error


@contextmanager
def making_directory(final: Path) -> Iterator[Path]:
    """A new empty directory to fill, which becomes ``final`` at the end; on an error it is gone.

    Raises :class:`StorageError`.
    """
    with storing(final), _locked(final.parent):
        half = Path(tempfile.mkdtemp(prefix=_HALF_MADE, dir=final.parent))
        try:
            half.chmod(0o755)
            yield half
            if final.exists():
                shutil.rmtree(final)
            half.rename(final)
        finally:
            shutil.rmtree(half, ignore_errors=True)


def write_file(final: Path, data: bytes) -> None:
    """Write a whole file or none.  Raises :class:`StorageError`."""
    with storing(final), _locked(final.parent):
        descriptor, half = tempfile.mkstemp(prefix=_HALF_MADE, dir=final.parent)
        try:
            with open(descriptor, "wb") as file:
                file.write(data)
            os.rename(half, final)
        except BaseException:
            os.unlink(half)
            raise


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """Hold the lock of ``directory``, made if need be, and clear away what was left in it."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        for left in directory.glob(_HALF_MADE + "*"):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)
        yield
    finally:
        os.close(descriptor)
