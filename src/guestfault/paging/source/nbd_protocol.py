"""The network block device protocol, as far as a reader needs it: the words on the wire.

Names are those of its specification (``doc/proto.md`` of the NBD project).  Everything is
big-endian.  A client greets, asks for one export by name with ``NBD_OPT_GO`` and learns its size;
then it sends requests, each with a cookie of its own choice, and gets simple replies, in any order,
each with the cookie of its request.  Structured replies, TLS and everything that writes is not
negotiated.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import Final

from guestfault.paging.source.wire import Wire

__all__ = ["DEFAULT_PORT", "REPLY", "Export", "NbdProtocolError", "NbdRefusedError"]
__all__ += ["disconnect", "negotiate", "parse_reply", "read_request"]

DEFAULT_PORT: Final = 10809  # IANA's

_NBDMAGIC: Final = b"NBDMAGIC"
_IHAVEOPT: Final = b"IHAVEOPT"
_NBD_FLAG_FIXED_NEWSTYLE: Final = 1 << 0
_NBD_FLAG_NO_ZEROES: Final = 1 << 1

_NBD_OPT_GO: Final = 7
_OPTION_REPLY_MAGIC: Final = 0x3E889045565A9
_NBD_REP_ACK: Final = 1
_NBD_REP_INFO: Final = 3
_NBD_REP_FLAG_ERROR: Final = 1 << 31
_ERRORS: Final = {
    1: "it does not know NBD_OPT_GO; it is too old",
    2: "its policy forbids it",
    3: "it takes the request for invalid",
    5: "it demands TLS, which is not supported here",
    6: "it has no such export",
    7: "it is shutting down",
}
_SHUTDOWN: Final = 7

_REQUEST: Final = struct.Struct(">IHHQQI")
_NBD_REQUEST_MAGIC: Final = 0x25609513
_NBD_CMD_READ: Final = 0
_NBD_CMD_DISC: Final = 2
REPLY: Final = struct.Struct(">IIQ")
_NBD_SIMPLE_REPLY_MAGIC: Final = 0x67446698

_MAX_OPTION_REPLY: Final = 1 << 16  # longer than any that a server has reason to send


class Info(IntEnum):
    """``NBD_INFO_*``."""

    EXPORT = 0
    BLOCK_SIZE = 3


class NbdProtocolError(Exception):
    """The server said what no server may say."""


class NbdRefusedError(Exception):
    """The server does not give the export.  ``passing``: it may do so later."""

    def __init__(self, why: str, passing: bool) -> None:
        self.passing = passing
        super().__init__(why)


@dataclass(frozen=True, slots=True)
class Export:
    """``size`` in bytes; reads begin and end at multiples of ``alignment``, or at the end."""

    size: int
    alignment: int
    maximum: int


def negotiate(wire: Wire, name: str, deadline: float) -> Export:
    """Greet, and ask for the export; afterwards the connection is one for requests.

    Raises :class:`NbdProtocolError`, :class:`NbdRefusedError`, and what the wire raises.
    """
    greeting = _receive(wire, 18, deadline)
    if greeting[:8] != _NBDMAGIC:
        raise NbdProtocolError("it is not an NBD server")
    (flags,) = struct.unpack(">H", greeting[16:])
    if greeting[8:16] != _IHAVEOPT or not flags & _NBD_FLAG_FIXED_NEWSTYLE:
        raise NbdProtocolError("it does not speak the fixed newstyle protocol; it is too old")
    encoded = name.encode()
    # One piece of information is asked for: the server may be choosy about alignment.
    data = struct.pack(">I", len(encoded)) + encoded + struct.pack(">HH", 1, Info.BLOCK_SIZE)
    wire.sendall(
        struct.pack(">I", _NBD_FLAG_FIXED_NEWSTYLE | flags & _NBD_FLAG_NO_ZEROES)
        + _IHAVEOPT
        + struct.pack(">II", _NBD_OPT_GO, len(data))
        + data,
        deadline,
    )
    size: int | None = None
    # What the specification advises a client to keep to that was told nothing else.
    alignment, maximum = 512, 32 << 20
    while True:
        magic, option, kind, length = struct.unpack(">QIII", _receive(wire, 20, deadline))
        if magic != _OPTION_REPLY_MAGIC or option != _NBD_OPT_GO or length > _MAX_OPTION_REPLY:
            raise NbdProtocolError("its reply to NBD_OPT_GO makes no sense")
        body = _receive(wire, length, deadline)
        if kind & _NBD_REP_FLAG_ERROR:
            raise _refused(kind & ~_NBD_REP_FLAG_ERROR, body)
        if kind == _NBD_REP_ACK:
            break
        if kind == _NBD_REP_INFO and length >= 2:
            match int.from_bytes(body[:2], "big"), length:
                case (Info.EXPORT, 12):
                    size = int.from_bytes(body[2:10], "big")
                case (Info.BLOCK_SIZE, 14):
                    alignment, _, maximum = struct.unpack(">III", body[2:])
    if size is None:
        raise NbdProtocolError("it did not tell the size of the export")
    if alignment < 1 or alignment & (alignment - 1) or maximum < alignment:
        raise NbdProtocolError(f"its block sizes make no sense: {alignment} to {maximum} bytes")
    return Export(size, alignment, maximum)


def _refused(code: int, body: bytes) -> NbdRefusedError:
    why = _ERRORS.get(code, f"it answered NBD_OPT_GO with error {code}")
    text = body.decode(errors="replace").strip()
    # The text is the server's own: shown, but short and on one line.
    said = f" ({' '.join(text.split())[:200]})" if text.isprintable() and text else ""
    return NbdRefusedError(why + said, passing=code == _SHUTDOWN)


def read_request(cookie: int, offset: int, length: int) -> bytes:
    """``NBD_CMD_READ``."""
    return _REQUEST.pack(_NBD_REQUEST_MAGIC, 0, _NBD_CMD_READ, cookie, offset, length)


def disconnect() -> bytes:
    """``NBD_CMD_DISC``: the polite end, which has no reply."""
    return _REQUEST.pack(_NBD_REQUEST_MAGIC, 0, _NBD_CMD_DISC, 0, 0, 0)


def parse_reply(header: bytes | bytearray) -> tuple[int, int]:
    """A simple reply's cookie and error; after one without error come the bytes of the read."""
    magic, error, cookie = REPLY.unpack(header)
    if magic != _NBD_SIMPLE_REPLY_MAGIC:
        raise NbdProtocolError(f"a reply begins with {magic:#010x}")
    return cookie, error


def _receive(wire: Wire, length: int, deadline: float) -> bytes:
    data = bytearray(length)
    wire.recv_exactly(memoryview(data), deadline)
    return bytes(data)
