"""Reading the processor's hidden segment state, for which Unicorn has no call.

A guest that loads a segment register changes its base, limit and rights, and ``KVM_GET_SREGS`` must
show them.  Unicorn's interface gives the selector alone.  But a saved context is a copy of the
processor's whole state, with QEMU's six ``SegmentCache`` records one after another in it; where
they lie is found once, by loading a base that occurs nowhere else and looking for it.
"""

from __future__ import annotations

import struct
from typing import NamedTuple

from guestfault.softkvm.engine import State

__all__ = ["NAMES", "SegmentCache", "find_offset", "read_segment", "read_segments"]

NAMES = ("es", "cs", "ss", "ds", "fs", "gs")  # in the order of the processor's array
_RECORD = struct.Struct("<I4xQII")  # selector, base, limit, flags


class SegmentCache(NamedTuple):
    """One segment register; ``attributes`` in the VMCB's 12-bit packing."""

    selector: int
    base: int
    limit: int
    attributes: int


def find_offset(context: bytes, es_base: int) -> int:
    """Where the records begin in a saved context of a processor whose ES has this base."""
    at = context.find(es_base.to_bytes(8, "little"))
    if at < 8 or context.find(es_base.to_bytes(8, "little"), at + 1) >= 0:
        raise RuntimeError("this version of Unicorn keeps its segment registers elsewhere")
    return at - 8


def read_segment(state: State, offset: int, name: str) -> SegmentCache:
    """One of the six segment registers in a saved state."""
    at = offset + NAMES.index(name) * _RECORD.size
    return _segment(*_RECORD.unpack(state.bytes_at(at, _RECORD.size)))


def read_segments(state: State, offset: int) -> dict[str, SegmentCache]:
    """The six segment registers in a saved state."""
    records = state.bytes_at(offset, len(NAMES) * _RECORD.size)
    found = {}
    for name, record in zip(NAMES, _RECORD.iter_unpack(records), strict=True):
        found[name] = _segment(*record)
    return found


def _segment(selector: int, base: int, limit: int, flags: int) -> SegmentCache:
    return SegmentCache(selector, base, limit, (flags >> 8 & 0xFF) | (flags >> 12 & 0xF00))
