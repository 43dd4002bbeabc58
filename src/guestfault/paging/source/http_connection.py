"""A connection of :mod:`http.client` on which a request has one deadline, and can be interrupted.

Of a socket, ``http.client`` uses three methods.  Here it gets them from a
:class:`~guestfault.paging.source.wire.Wire`.
"""

from __future__ import annotations

import http.client
import io
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from guestfault.paging.source.interrupt import Interrupt
from guestfault.paging.source.wire import Wire

__all__ = ["Connection"]


class _Socket:
    """A wire as :mod:`http.client` uses a socket, with one ``deadline`` for a whole request."""

    def __init__(self, wire: Wire, deadline: float) -> None:
        self._wire = wire
        self._reader: _Reader | None = None
        self._closed = False
        self.deadline = deadline

    def sendall(self, data: bytes) -> None:
        self._wire.sendall(data, self.deadline)

    def makefile(self, mode: str) -> io.BufferedReader:
        """What one response is read from."""
        self._reader = _Reader(self)
        return io.BufferedReader(self._reader, 1 << 16)

    def recv_into(self, buffer: memoryview) -> int:
        return self._wire.recv_into(buffer, self.deadline)

    def close(self) -> None:
        """Close it, or let its last response do so: it is closed before that has been read."""
        self._closed = True
        if self._reader is None or self._reader.closed:
            self._wire.close()

    def read_to_the_end(self) -> None:
        """The response has been closed."""
        if self._closed:
            self._wire.close()


class _Reader(io.RawIOBase):
    def __init__(self, source: _Socket) -> None:
        self._source = source

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self._source.recv_into(memoryview(buffer))

    def close(self) -> None:
        super().close()
        self._source.read_to_the_end()


class Connection(http.client.HTTPConnection):
    """To ``host`` and ``port``; encrypted, with ``tls``."""

    sock: Any  # a _Socket

    def __init__(
        self, host: str, port: int, tls: ssl.SSLContext | None, interrupt: Interrupt
    ) -> None:
        super().__init__(host, port)
        self.default_port = 443 if tls else 80  # it is left out of the Host header
        self._tls = tls
        self._interrupt = interrupt
        self._deadline = 0.0

    def restart(self, deadline: float) -> None:
        """A new request begins, which has until ``deadline``."""
        self._deadline = deadline
        if self.sock is not None:
            self.sock.deadline = deadline

    def connect(self) -> None:
        """Called for the first request."""
        wire = Wire.tcp(self.host, self.port, self._interrupt, self._deadline)
        try:
            if self._tls is not None:
                wire.start_tls(self._tls, self.host, self._deadline)
        except BaseException:
            wire.close()
            raise
        self.sock = _Socket(wire, self._deadline)

    @contextmanager
    def closed_if_it_fails(self, response: http.client.HTTPResponse) -> Iterator[None]:
        """Whatever fails in the middle of a response, the rest of it must not be read as next."""
        try:
            yield
        except BaseException:
            response.close()
            self.close()
            raise
