"""Where a source is, in one word: a path or a URL.

========================================= ==================================================
a path                                    a file or a block device
``http://...`` ``https://...``            :mod:`~guestfault.paging.source.http`
``nbd://host[:port]/export``              :mod:`~guestfault.paging.source.nbd`
``nbd+unix:///export?socket=path``        the same, over a Unix domain socket
========================================= ==================================================

What is remote is read with patience (:mod:`~guestfault.paging.source.resilient`), and in blocks of
many pages unless it is packed, for a request costs more than the bytes that it brings.  It has to
be there at the beginning: a mistyped name is not worth waiting for.
"""

from __future__ import annotations

import errno
import os
import re
import stat

from guestfault.paging.source.base import PageSource, SourceError, close
from guestfault.paging.source.blocks import CachedSource
from guestfault.paging.source.file import FileSource
from guestfault.paging.source.resilient import Patience, ResilientSource
from guestfault.paging.source.zstd import PackedSource, is_packed

__all__ = ["is_url", "name_of", "open_bytes", "open_pages"]

DEFAULT_TIMEOUT = 10.0  # seconds


def is_url(where: str) -> bool:
    """Whether it is a URL and not a path."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", where) is not None


def name_of(where: str) -> str:
    """As it may be shown: without what is secret in a URL."""
    if not where.lower().startswith(("http:", "https:")):
        return where
    from guestfault.paging.source.http import without_secrets

    return without_secrets(where)


def open_bytes(
    where: str, timeout: float = DEFAULT_TIMEOUT, patience: Patience | None = None
) -> PageSource:
    """The bytes there, whatever they are.

    Raises :class:`~guestfault.paging.source.base.SourceError`.  Closed by
    :func:`guestfault.paging.source.base.close`.
    """
    if not is_url(where):
        try:
            # Not to wait for the other end of a pipe.
            fd = os.open(where, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise SourceError(0, 0, f"{where}: {error.strerror}") from None
        try:
            if stat.S_ISDIR(os.fstat(fd).st_mode):
                raise SourceError(0, 0, os.strerror(errno.EISDIR))
            return FileSource(fd)
        except SourceError as error:
            os.close(fd)
            raise error.at(0, 0, f"{where}: ") from None
    scheme = where.partition(":")[0].lower()
    # Loaded only for who needs them: sockets, TLS and HTTP take longer than all the other sources.
    match scheme:
        case "http" | "https":
            from guestfault.paging.source.http import HttpSource

            return ResilientSource(HttpSource(where, timeout), patience)
        case "nbd" | "nbd+unix":
            from guestfault.paging.source.nbd import NbdSource

            return ResilientSource(NbdSource(where, timeout), patience)
    known = "use http, https, nbd or nbd+unix"
    raise SourceError(0, 0, f"{name_of(where)}: no pages can be had by {scheme}; {known}")


def open_pages(
    where: str, timeout: float = DEFAULT_TIMEOUT, patience: Patience | None = None
) -> PageSource:
    """The guest memory there: raw, or that of a packed snapshot.

    Raises as :func:`open_bytes` does.
    """
    source = open_bytes(where, timeout, patience)
    try:
        if is_packed(source):
            return PackedSource(source)
    except BaseException:
        close(source)
        raise
    return CachedSource(source) if is_url(where) else source
