"""A stream socket on which every wait has an end: a deadline, or somebody's wish.

A socket's own timeout starts anew with every byte, so a server that trickles holds its reader for
ever.  Here a deadline is given for the whole request, and :class:`Interrupt` ends the wait before
it.  The name of a host is looked up by the C library, which takes as long as its resolver is
set to, and cannot be interrupted.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import ssl
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from guestfault.paging.source.interrupt import Interrupt

__all__ = ["Wire"]

_T = TypeVar("_T")
_READ, _WRITE = select.POLLIN, select.POLLOUT


class Wire:
    """A connected socket.  One thread may send while another receives.

    A ``deadline`` is of :func:`time.monotonic`.  Every method raises :class:`TimeoutError` once it
    has passed, :class:`~guestfault.paging.source.interrupt.WaitInterrupted`, and :class:`OSError`.
    After any of them nobody knows what is on the way: close it.
    """

    def __init__(self, unconnected: socket.socket, interrupt: Interrupt) -> None:
        self._socket = unconnected
        self._interrupt = interrupt

    @classmethod
    def tcp(cls, host: str, port: int, interrupt: Interrupt, deadline: float) -> Wire:
        """Connect to the first of the host's addresses that answers."""
        try:
            addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        except UnicodeError:
            raise OSError(errno.EADDRNOTAVAIL, "that cannot be a host's name") from None
        while True:
            family, kind, protocol, _, address = addresses.pop(0)
            wire = cls(socket.socket(family, kind, protocol), interrupt)
            try:
                wire._connect(address, deadline)
            except OSError:
                if not addresses:
                    raise
            else:
                # A request is one small write that nothing follows: do not hold it back.
                wire._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                return wire

    @classmethod
    def unix(cls, path: str, interrupt: Interrupt, deadline: float) -> Wire:
        """Connect to a Unix domain socket."""
        made = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        wire = cls(made, interrupt)
        wire._connect(path, deadline)
        return wire

    def _connect(self, address: Any, deadline: float) -> None:
        try:
            self._socket.setblocking(False)
            error = self._socket.connect_ex(address)
            if error == errno.EINPROGRESS:
                self._wait(_WRITE, deadline)
                error = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
            if error:
                raise OSError(error, os.strerror(error))
        except BaseException:
            self._socket.close()
            raise

    def start_tls(self, context: ssl.SSLContext, host: str, deadline: float) -> None:
        """Encrypt from here on, with a server that proves to be ``host``."""
        wrapped = context.wrap_socket(
            self._socket, server_hostname=host, do_handshake_on_connect=False
        )
        self._socket = wrapped
        self._attempt(wrapped.do_handshake, _READ, deadline)

    def recv_into(self, buffer: memoryview, deadline: float) -> int:
        """How many bytes came, at least one; 0 at the end of the stream."""
        return self._attempt(lambda: self._socket.recv_into(buffer), _READ, deadline)

    def recv_exactly(self, buffer: memoryview, deadline: float) -> None:
        """Fill the buffer; raises :class:`ConnectionError` if the stream ends before."""
        done = 0
        while done < len(buffer):
            n = self.recv_into(buffer[done:], deadline)
            if n == 0:
                raise ConnectionResetError(
                    errno.ECONNRESET, f"the connection ended after {done} of {len(buffer)} bytes"
                )
            done += n

    def sendall(self, data: bytes, deadline: float) -> None:
        """Send all of it."""
        rest = memoryview(data)
        while rest:
            rest = rest[self._attempt(partial(self._socket.send, rest), _WRITE, deadline) :]

    def hang_up(self) -> None:
        """From any thread: whoever waits here sees the end of the stream."""
        with suppress(OSError):  # it is at its end already
            socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # TLS's own says goodbye first

    def close(self) -> None:
        """Give the descriptor up.  Nobody may wait on it."""
        self._socket.close()

    def _attempt(self, call: Callable[[], _T], wants: int, deadline: float) -> _T:
        self._interrupt.check()
        while True:
            try:
                return call()
            # TLS may have to read in order to write, and the other way round.
            except ssl.SSLWantReadError:
                self._wait(_READ, deadline)
            except ssl.SSLWantWriteError:
                self._wait(_WRITE, deadline)
            except BlockingIOError:
                self._wait(wants, deadline)

    def _wait(self, events: int, deadline: float) -> None:
        if not self._interrupt.wait(self._socket.fileno(), events, deadline):
            raise TimeoutError(errno.ETIMEDOUT, "no answer in time")
