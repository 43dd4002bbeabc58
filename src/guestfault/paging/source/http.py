"""Pages from an HTTP server, by range requests.

Any server does that answers a ``Range`` header (RFC 9110, section 14): nginx, Apache, an object
store, a content network.  A read is one ``GET`` for exactly its bytes, and what comes back is
believed only if all of it fits: status 206, a ``Content-Range`` that names the bytes asked for and
the size known, that many bytes, not encoded, and the ``ETag`` and ``Last-Modified`` that the file
had when it was opened.  A file that was replaced since would give pages of two guests.

As many connections are open as reads are under way at a time; they are kept for the next ones.
``http.client`` rather than a library: one method, no body to send, and the socket has to be ours,
so that a read can be ended at any time (:mod:`guestfault.paging.source.wire`).

A redirection is followed when the source is opened, and not later.  ``user:password`` in the URL is
sent as Basic authentication; it and the query, which may hold a signature, are left out of every
message.  Proxies that the environment names are not used.
"""

from __future__ import annotations

import base64
import http.client
import re
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from urllib.parse import SplitResult, unquote, urljoin, urlsplit

from guestfault.paging.source.base import (
    SourceError,
    SourceInterruptedError,
    SourceUnavailableError,
    check_range,
)
from guestfault.paging.source.http_connection import Connection
from guestfault.paging.source.interrupt import Interrupt, WaitInterrupted

__all__ = ["HttpSource", "without_secrets"]

_PORTS: Final = {"http": 80, "https": 443}
_REDIRECTIONS: Final = (301, 302, 303, 307, 308)
_MAX_REDIRECTIONS: Final = 5
# The server, or something on the way to it, has no answer now: RFC 9110 15.5.9, 15.6; RFC 6585 4.
_PASSING: Final = (408, 425, 429, 500, 502, 503, 504)
_PIECE: Final = 1 << 20  # of a longer read, so that its timeout is one of progress


class HttpSource:
    """The file at an ``http`` or ``https`` URL.

    ``timeout`` is in seconds, for one request from beginning to end, of at most 1 MiB.  Raises
    :class:`~guestfault.paging.source.base.SourceUnavailableError` if there is no answer in time,
    and other :class:`~guestfault.paging.source.base.SourceError` if it is not one to rely on.
    """

    def __init__(self, url: str, timeout: float = 10.0) -> None:
        self._timeout = timeout
        self._interrupt = Interrupt()
        self._idle: list[Connection] = []
        try:
            self._use(url)
            self._open()
        except BaseException:
            self.close()
            raise

    def _use(self, url: str) -> None:
        self.url = without_secrets(url)
        parts = urlsplit(url)
        try:
            port = parts.port or _PORTS[parts.scheme]
        except (KeyError, ValueError):
            raise SourceError(0, 0, f"{self.url}: not an http or https URL") from None
        if not parts.hostname:
            raise SourceError(0, 0, f"{self.url}: it names no host")
        self._host, self._port = parts.hostname, port
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        # Compressed on the way, a range would be one of something else.
        self._headers = {"Accept-Encoding": "identity"} | _authorization(parts)

    def _open(self) -> None:
        """Learn the file's size and version from its first byte."""
        for _ in range(_MAX_REDIRECTIONS):
            with self._guarded(0, 1):
                response, location = self._first_byte()
            if location is None:
                break
            target = urljoin(self._whole_url(), location)
            if self._tls is not None and not target.startswith("https:"):
                raise SourceError(0, 0, f"{self.url}: it redirects to where nothing is encrypted")
            self._use(target)
        else:
            raise SourceError(0, 0, f"{self.url}: more than {_MAX_REDIRECTIONS} redirections")
        self.size = _total(response.headers.get("Content-Range"))
        self._version = _version(response)

    def _whole_url(self) -> str:
        scheme = "https" if self._tls else "http"
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"{scheme}://{host}:{self._port}{self._target}"

    def _first_byte(self) -> tuple[http.client.HTTPResponse, str | None]:
        """The response with the file's first byte, or where to look for the file instead."""
        connection, response = self._request(0, 1)
        with connection.closed_if_it_fails(response):
            if response.status in _REDIRECTIONS:
                connection.close()
                return response, response.headers.get("Location", "")
            if response.status == 416:
                raise _Lie("the file is empty")
            _check_status(response)
            if _total(response.headers.get("Content-Range")) < 1:
                raise _Lie(f"Content-Range is {response.headers.get('Content-Range')!r}")
            self._body(connection, response, memoryview(bytearray(1)))
        return response, None

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See :class:`~guestfault.paging.source.base.PageSource`."""
        check_range(self, offset, len(buffer))
        for done in range(0, len(buffer), _PIECE):
            piece = buffer[done : done + _PIECE]
            with self._guarded(offset + done, len(piece)):
                self._range(offset + done, piece)

    def _range(self, offset: int, buffer: memoryview) -> None:
        connection, response = self._request(offset, len(buffer))
        with connection.closed_if_it_fails(response):
            _check_status(response)
            asked = f"bytes {offset}-{offset + len(buffer) - 1}/{self.size}"
            given = response.headers.get("Content-Range", "nothing")
            if given != asked:
                raise _Lie(f"asked for {asked!r}, it gave {given!r}")
            if (now := _version(response)) != self._version:
                raise _Lie(f"the file has changed: it was {self._version}, and is {now}")
            self._body(connection, response, buffer)

    def _request(self, offset: int, length: int) -> tuple[Connection, http.client.HTTPResponse]:
        """Ask for a range; the beginning of the answer."""
        headers = self._headers | {"Range": f"bytes={offset}-{offset + length - 1}"}
        deadline = time.monotonic() + self._timeout
        while True:
            try:
                connection = self._idle.pop()
                reused = True
            except IndexError:
                reused = False
                connection = Connection(self._host, self._port, self._tls, self._interrupt)
            try:
                connection.restart(deadline)
                connection.request("GET", self._target, headers=headers)
                return connection, connection.getresponse()
            except ConnectionError:
                # Servers hang up on idle connections, which is no failure of theirs.
                connection.close()
                if not reused:
                    raise
            except BaseException:
                connection.close()
                raise

    def _body(
        self, connection: Connection, response: http.client.HTTPResponse, buffer: memoryview
    ) -> None:
        encoding = response.headers.get("Content-Encoding", "identity")
        if encoding != "identity":
            raise _Lie(f"it is encoded: {encoding}")
        if response.length is not None and response.length != len(buffer):
            raise _Lie(f"Content-Length is {response.length} for {len(buffer)} bytes")
        done = 0
        while done < len(buffer):
            n = response.readinto(buffer[done:])
            if n == 0:
                why = f"the connection ended after {done} of {len(buffer)} bytes"
                raise ConnectionResetError(why)
            done += n
        if response.length is None and response.read(1):  # chunked, or until it hangs up
            raise _Lie(f"more than {len(buffer)} bytes came")
        if response.will_close:
            connection.close()
        else:
            self._idle.append(connection)

    @contextmanager
    def _guarded(self, offset: int, length: int) -> Iterator[None]:
        """Turn what can go wrong on the way into the errors of a source."""
        try:
            yield
        except WaitInterrupted:
            raise SourceInterruptedError(offset, length) from None
        except _Passing as error:
            raise SourceUnavailableError(offset, length, f"{self.url}: {error}") from None
        except TimeoutError:
            why = f"{self.url}: no answer within {self._timeout:g} s"
            raise SourceUnavailableError(offset, length, why) from None
        except ssl.SSLCertVerificationError as error:
            raise SourceError(offset, length, f"{self.url}: {error.verify_message}") from error
        except OSError as error:
            why = f"{self.url}: {error.strerror or error}"
            raise SourceUnavailableError(offset, length, why) from error
        except _Lie as error:
            raise SourceError(offset, length, f"{self.url}: {error}") from None
        except http.client.IncompleteRead:  # of a body in chunks
            why = f"{self.url}: the connection ended in the middle"
            raise SourceUnavailableError(offset, length, why) from None
        except http.client.HTTPException as error:
            why = f"{self.url}: no answer in HTTP ({type(error).__name__}: {error})"
            raise SourceError(offset, length, why) from error

    def interrupt(self) -> None:
        """See :class:`~guestfault.paging.source.base.Interruptible`."""
        self._interrupt.set()

    def resume(self) -> None:
        """See :class:`~guestfault.paging.source.base.Interruptible`."""
        self._interrupt.clear()

    def close(self) -> None:
        """Close all connections.  Not while it is being read."""
        while self._idle:
            self._idle.pop().close()
        self._interrupt.close()


class _Lie(Exception):
    """The server answered, and its answer must not be used."""


class _Passing(Exception):
    """The server says that it cannot answer now."""


def _authorization(parts: SplitResult) -> dict[str, str]:
    if parts.username is None:
        return {}
    words = f"{unquote(parts.username)}:{unquote(parts.password or '')}"
    return {"Authorization": f"Basic {base64.b64encode(words.encode()).decode()}"}


def _check_status(response: http.client.HTTPResponse) -> None:
    if response.status == 206:
        return
    status = f"{response.status} {response.reason}".strip()
    if response.status in _PASSING:
        raise _Passing(status)
    if response.status == 200:
        raise _Lie("the server does not serve ranges of this file (200 instead of 206)")
    raise _Lie(status)


def _total(content_range: str | None) -> int:
    """The file's size, from ``bytes 0-0/SIZE``; 0 if that is not what it is."""
    match = re.fullmatch(r"bytes 0-0/(\d+)", content_range or "")
    return int(match[1]) if match else 0


def _version(response: http.client.HTTPResponse) -> str:
    names = ("ETag", "Last-Modified")
    said = [f"{name} {response.headers[name]}" for name in names if name in response.headers]
    return ", ".join(said) or "without ETag and Last-Modified"


def without_secrets(url: str) -> str:
    """The URL as it may be shown: without user, password and query."""
    parts = urlsplit(url)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
