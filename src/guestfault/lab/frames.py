"""What the first process inside tells us, as frames over a serial port.

A serial port carries bytes and nothing else: no end of file, no streams apart from one another,
and whatever else the kernel chooses to write there.  So everything travels in frames: a mark, the
kind, the length, the payload, and a check sum.  What is not a frame is passed over, and a frame
that was cut short by a machine's end is never taken for a whole one.

=========  =====================================================================================
kind       payload
=========  =====================================================================================
HELLO      the first process runs; JSON: the kernel's release, its seconds since start
NO_KVM     text: there is no ``/dev/kvm``, and why
READY      the command begins; empty
STDOUT     bytes that the command wrote
STDERR     likewise
FILE       a part of a file that was asked for: its path, a zero byte, the next bytes of it
MISSING    a file that was asked for and cannot be read: its path, a zero byte, why
STATUS     text: the command's exit status, 128 + N after signal N, as a shell would say
FAILED     text: the first process itself cannot go on
DONE       nothing comes any more; empty
=========  =====================================================================================
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from enum import IntEnum
from typing import NamedTuple
from zlib import crc32

__all__ = ["MAX_PAYLOAD", "Frame", "Kind", "Reader", "encode"]

_HEAD = struct.Struct("<4sBII")  # mark, kind, length, check sum of kind and payload
_MARK = b"\xa5gf\x5a"
MAX_PAYLOAD = 64 << 10
"""The longest payload, in bytes: a length beyond it is not a frame's."""


class Kind(IntEnum):
    """What a frame is about."""

    HELLO = 1
    NO_KVM = 2
    READY = 3
    STDOUT = 4
    STDERR = 5
    FILE = 6
    MISSING = 7
    STATUS = 8
    FAILED = 9
    DONE = 10


class Frame(NamedTuple):
    """One message."""

    kind: Kind
    payload: bytes

    def named(self) -> tuple[str, bytes]:
        """The path and the rest, of a FILE or MISSING."""
        path, _, rest = self.payload.partition(b"\0")
        return path.decode("utf-8", "surrogateescape"), rest

    def text(self) -> str:
        """The payload as text, whatever it holds."""
        return self.payload.decode("utf-8", "replace")


def encode(kind: Kind, payload: bytes = b"") -> bytes:
    """One frame's bytes.  Raises :class:`ValueError` above :data:`MAX_PAYLOAD`."""
    if len(payload) > MAX_PAYLOAD:
        raise ValueError(f"a frame holds at most {MAX_PAYLOAD} bytes, not {len(payload)}")
    return _HEAD.pack(_MARK, kind, len(payload), _check(kind, payload)) + payload


def _check(kind: int, payload: bytes) -> int:
    return crc32(payload, kind)


class Reader:
    """Takes bytes as they come, and gives the frames in them as they are whole."""

    def __init__(self) -> None:
        self._bytes = bytearray()

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that ``data`` completes, in order.  To be gone through before the next."""
        self._bytes += data
        while (frame := self._next()) is not None:
            yield frame

    def _next(self) -> Frame | None:
        held = self._bytes
        while True:
            at = held.find(_MARK)
            if at < 0:
                del held[: max(0, len(held) - len(_MARK) + 1)]  # the mark may be half here
                return None
            del held[:at]
            if len(held) < _HEAD.size:
                return None
            _, kind, length, check = _HEAD.unpack_from(held)
            if kind in Kind.__members__.values() and length <= MAX_PAYLOAD:
                end = _HEAD.size + length
                if len(held) < end:
                    return None
                payload = bytes(held[_HEAD.size : end])
                if _check(kind, payload) == check:
                    del held[:end]
                    return Frame(Kind(kind), payload)
            del held[:1]  # it only looked like one
