"""Pages from an NBD server: qemu-nbd, nbdkit, nbd-server.

One connection, with as many requests in flight as there are readers.  A reader sends its request
and waits for its reply; replies come in any order, so one of those who wait receives for all: it
hands every reply to the reader whose cookie it bears, until its own has come, and leaves the task
to the next.  No thread besides the readers' own, and nobody waits for a reply that is not theirs.

A connection on which anything was late, cut or wrong is given up with all that was asked on it, for
nobody could tell which bytes come next; the next reader makes a new one.  The export must then have
the size that it had.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from copy import copy
from urllib.parse import parse_qs, unquote, urlsplit

from guestfault.paging.source.base import (
    SourceError,
    SourceInterruptedError,
    SourceUnavailableError,
    check_range,
)
from guestfault.paging.source.interrupt import Interrupt, WaitInterrupted
from guestfault.paging.source.nbd_protocol import (
    DEFAULT_PORT,
    REPLY,
    Export,
    NbdProtocolError,
    NbdRefusedError,
    disconnect,
    negotiate,
    parse_reply,
    read_request,
)
from guestfault.paging.source.wire import Wire

__all__ = ["NbdSource"]

_PIECE = 1 << 20  # of a longer read, so that its timeout is one of progress


class NbdSource:
    """The export at ``nbd://host[:port]/export`` or ``nbd+unix:///export?socket=path``.

    ``timeout`` is in seconds, for one request of at most 1 MiB, or for making a connection.  Raises
    :class:`~guestfault.paging.source.base.SourceUnavailableError` if there is no answer in time,
    and other :class:`~guestfault.paging.source.base.SourceError` if it is not one to rely on.
    """

    def __init__(self, url: str, timeout: float = 10.0) -> None:
        self.url = url
        self._timeout = timeout
        self._parse(url)
        self._interrupt = Interrupt()
        self._connecting = threading.Lock()
        self._connection: _Connection | None = None
        self._export: Export | None = None
        try:
            with self._guarded(0, 0):
                self.size = self._connected().export.size
        except BaseException:
            self.close()
            raise

    def _parse(self, url: str) -> None:
        parts = urlsplit(url)
        self._name = unquote(parts.path.removeprefix("/"))
        self._socket = parse_qs(parts.query).get("socket", [""])[0]
        try:
            port = parts.port or DEFAULT_PORT
        except ValueError:
            port = 0
        self._host, self._port = parts.hostname or "", port
        match parts.scheme:
            case "nbd" if self._host and port:
                self._socket = ""
            case "nbd+unix" if self._socket:
                pass
            case "nbd" | "nbd+unix":
                how = "nbd://host[:port]/export or nbd+unix:///export?socket=path"
                raise SourceError(0, 0, f"{url}: write {how}")
            case _:
                raise SourceError(0, 0, f"{url}: not an nbd or nbd+unix URL")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See :class:`~guestfault.paging.source.base.PageSource`."""
        length = len(buffer)
        check_range(self, offset, length)
        with self._guarded(offset, length):
            done, again = 0, False
            while done < length:
                connection = self._connected()
                try:
                    done += connection.read_into(offset + done, buffer[done : done + _PIECE])
                except ConnectionError:
                    # An idle connection may have been cut long ago, and another's read may have
                    # spoilt this one: neither says that the server cannot be had.
                    if again:
                        raise
                    again = True

    def _connected(self) -> _Connection:
        """A connection that nothing is wrong with as far as is known."""
        connection = self._connection
        if connection is None or connection.broken is not None:
            # Those who come meanwhile wait for this one, and no longer than it takes.
            with self._connecting:
                connection = self._connection
                if connection is None or connection.broken is not None:
                    connection = self._connection = self._connect()
        return connection

    def _connect(self) -> _Connection:
        deadline = time.monotonic() + self._timeout
        if self._socket:
            wire = Wire.unix(self._socket, self._interrupt, deadline)
        else:
            wire = Wire.tcp(self._host, self._port, self._interrupt, deadline)
        try:
            export = negotiate(wire, self._name, deadline)
            before = self._export or export
            if export.size != before.size:
                what = f"the export has changed: it had {before.size} bytes, and has {export.size}"
                raise NbdProtocolError(what)
            self._export = export
        except BaseException:
            wire.close()
            raise
        return _Connection(wire, export, self._timeout)

    @contextmanager
    def _guarded(self, offset: int, length: int) -> Iterator[None]:
        """Turn what can go wrong on the way into the errors of a source."""
        try:
            yield
        except WaitInterrupted:
            raise SourceInterruptedError(offset, length) from None
        except TimeoutError:
            why = f"{self.url}: no answer within {self._timeout:g} s"
            raise SourceUnavailableError(offset, length, why) from None
        except OSError as error:
            why = f"{self.url}: {error.strerror or error}"
            raise SourceUnavailableError(offset, length, why) from error
        except NbdRefusedError as error:
            kind = SourceUnavailableError if error.passing else SourceError
            raise kind(offset, length, f"{self.url}: {error}") from None
        except (NbdProtocolError, _ReadError) as error:
            raise SourceError(offset, length, f"{self.url}: {error}") from None

    def interrupt(self) -> None:
        """See :class:`~guestfault.paging.source.base.Interruptible`."""
        self._interrupt.set()

    def resume(self) -> None:
        """See :class:`~guestfault.paging.source.base.Interruptible`."""
        self._interrupt.clear()

    def close(self) -> None:
        """Take leave of the server.  Not while it is being read."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None
        self._interrupt.close()


class _ReadError(Exception):
    """The server could not read what was asked of it."""


class _Request:
    """A read that was sent, and its reply."""

    __slots__ = ("data", "error", "length")

    def __init__(self, length: int) -> None:
        self.length = length
        self.data: bytearray | None = None
        self.error = 0

    @property
    def over(self) -> bool:
        return self.data is not None or self.error != 0


class _Connection:
    """A connection in its transmission phase, for any number of threads."""

    def __init__(self, wire: Wire, export: Export, timeout: float) -> None:
        self.export = export
        self.broken: Exception | None = None  # set once, and for good
        self._wire = wire
        self._timeout = timeout
        self._cookies = itertools.count(1)
        self._sending = threading.Lock()
        self._changed = threading.Condition()
        self._requests: dict[int, _Request] = {}
        self._receiving = False
        self._readers = 0

    def read_into(self, offset: int, buffer: memoryview) -> int:
        """Read the beginning of ``buffer``; how much of it."""
        step = self.export.alignment
        start = offset - offset % step
        length = min(len(buffer), self.export.maximum - (offset - start))
        end = min(self.export.size, -(-(offset + length) // step) * step)
        if end - start > self.export.maximum:
            end = start + self.export.maximum - self.export.maximum % step
            length = end - offset
        data = self._read(start, end - start)
        buffer[:length] = memoryview(data)[offset - start :][:length]
        return length

    def _read(self, offset: int, length: int) -> bytearray:
        """The bytes, in a buffer of their own: a reply that is late must not find the reader's."""
        cookie, request = next(self._cookies), _Request(length)
        deadline = time.monotonic() + self._timeout
        with self._changed:
            if self.broken is not None:  # and perhaps closed
                raise ConnectionAbortedError(errno.ECONNABORTED, "the connection was given up")
            self._readers += 1
            self._requests[cookie] = request
        try:
            with self._sending:
                self._wire.sendall(read_request(cookie, offset, length), deadline)
            self._await(request, deadline)
            if request.error == errno.ESHUTDOWN:
                raise ConnectionAbortedError(errno.ECONNABORTED, "the server is shutting down")
        except BaseException as error:
            self._break(error)
            raise
        finally:
            self._leave()
        if request.error:
            # The specification uses Linux's numbers.
            raise _ReadError(f"the server cannot read there: {os.strerror(request.error)}")
        assert request.data is not None
        return request.data

    def _await(self, request: _Request, deadline: float) -> None:
        while True:
            with self._changed:
                while self._receiving and not request.over and self.broken is None:
                    if not self._changed.wait(max(0, deadline - time.monotonic())):
                        raise TimeoutError
                if request.over:
                    return
                if self.broken is not None:
                    raise copy(self.broken)
                self._receiving = True
            try:
                while not request.over:
                    self._receive(deadline)
            finally:
                with self._changed:
                    self._receiving = False
                    self._changed.notify_all()

    def _receive(self, deadline: float) -> None:
        """Receive one reply, and give it to whom it is for."""
        header = bytearray(REPLY.size)
        self._wire.recv_exactly(memoryview(header), deadline)
        cookie, error = parse_reply(header)
        request = self._requests.get(cookie)
        if request is None:
            raise NbdProtocolError("it answers what was not asked")
        data = bytearray(request.length)
        if not error:
            self._wire.recv_exactly(memoryview(data), deadline)
        with self._changed:
            del self._requests[cookie]
            if error:
                request.error = error
            else:
                request.data = data
            self._changed.notify_all()

    def _break(self, error: BaseException) -> None:
        """Nobody can go on here: end every wait."""
        with self._changed:
            if self.broken is None:
                if not isinstance(error, Exception) or isinstance(error, TimeoutError):
                    # What happened to one reader only; the others may try again.
                    why = "the connection was given up for another read's sake"
                    error = ConnectionAbortedError(errno.ECONNABORTED, why)
                self.broken = copy(error)  # without its traceback, which refers to buffers
            self._changed.notify_all()
        self._wire.hang_up()

    def _leave(self) -> None:
        """A reader is done: the last one to leave a broken connection closes it."""
        with self._changed:
            self._readers -= 1
            if self.broken is not None and not self._readers:
                self._wire.close()

    def close(self) -> None:
        """Say goodbye, and close.  Not while it is being read."""
        if self.broken is None:
            with suppress(OSError, WaitInterrupted):
                self._wire.sendall(disconnect(), time.monotonic() + 1)
        self._wire.close()
