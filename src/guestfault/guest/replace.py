"""A file or a directory that appears under its name whole, or not at all.

It is written under a hidden name beside the one it is to have, flushed to the disk, and renamed.
Either is for its owner only.  What had the name before is gone only when the new one has it.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

__all__ = ["replacing_directory", "replacing_file"]


@contextmanager
def replacing_directory(final: Path) -> Iterator[Path]:
    """A directory to fill with files, which are flushed already when it takes its place.

    Raises :class:`OSError`; the directory is removed after any error.
    """
    staging = Path(tempfile.mkdtemp(prefix=f".{final.name}.", dir=final.parent))
    try:
        yield staging
        _move_into_place(staging, final)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def replacing_file(final: Path) -> Iterator[BinaryIO]:
    """A file to write, which then takes its place; raises :class:`OSError`."""
    fd, name = tempfile.mkstemp(prefix=f".{final.name}.", dir=final.parent)
    try:
        with open(fd, "wb") as file:
            yield file
            file.flush()
            os.fsync(fd)
        os.rename(name, final)
    except BaseException:
        os.unlink(name)
        raise
    _flush_directory(final.parent)


def _move_into_place(staging: Path, final: Path) -> None:
    """Rename the new directory to its name.

    Between the two renames there is none under the name, which is not half of one.
    """
    if final.exists():
        old = staging.with_name(f"{staging.name}.old")
        final.rename(old)
        try:
            staging.rename(final)
        except OSError:
            old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)
    else:
        staging.rename(final)
    _flush_directory(final.parent)


def _flush_directory(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
