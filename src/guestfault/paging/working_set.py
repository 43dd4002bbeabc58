"""The working set: which pages a guest touched when it ran, in the order of their first touch.

A restored guest does much the same each time: it wakes up in the same place, and goes over the same
pages until it has answered its first request.  On demand each of them costs a trip to the source,
one after the other.  Whoever knows the order beforehand can make the trips before the guest gets
there (:mod:`~guestfault.paging.prefetcher`).  This is what REAP found of function VMs (Ustiugov et
al., ASPLOS 2021), whose record is a trace of page faults, too.

**Recording.**  A page that comes in on demand, by itself, is read from its source at its first
touch.  So the order of the reads is the order of the touches, merged over all vCPUs, and to record
is to stand between the pager and the source (:class:`RecordingSource`).  It holds as long as
nothing is brought in ahead, which is for whoever records to see to.

**The file.**  Numbers are little-endian.

====== ===== =====================================================================================
offset size  what
====== ===== =====================================================================================
0      16    ``guestfault wset`` and a zero byte
16     4     1: the version of this format
20     4     4096: the page size
24     32    the identity of the snapshot that ran: without that snapshot the order means nothing
56     8     how many pages the snapshot's memory has
64     8     R: the number of runs
72     8 R   the order, in runs of neighbours that were touched upwards one after the other: 4 bytes
             the first page's number, 4 bytes how many pages
72+8 R 16    BLAKE2b of all before it, with 16 bytes of output
====== ===== =====================================================================================

A page is in the order once.  A walk straight through memory is one run; the worst case is eight
bytes for each page of 4096.
"""

from __future__ import annotations

import hashlib
import struct
import sys
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Self

from guestfault.memory.ram import PAGE_SIZE
from guestfault.paging.source.base import PageSource, SourceUpon

__all__ = ["IDENTITY_SIZE", "RecordingSource", "WorkingSet", "looks_recorded", "runs_of"]

IDENTITY_SIZE: Final = 32
SIGNATURE: Final = b"guestfault wset\0"
VERSION: Final = 1

_HEAD: Final = struct.Struct(f"<16sII{IDENTITY_SIZE}sQQ")
_RUN_SIZE: Final = 8
_DIGEST_SIZE: Final = 16
_MOST_PAGES: Final = 1 << 32  # 16 TiB: a run has four bytes for a page's number
assert array("I").itemsize * 2 == _RUN_SIZE


def looks_recorded(beginning: bytes) -> bool:
    """Whether a file that begins so is a working set, of any version."""
    return beginning[: len(SIGNATURE)] == SIGNATURE


def runs_of(pages: Iterable[int]) -> Iterator[range]:
    """The same pages in the same order, neighbours that follow each other upwards as one.

    >>> list(runs_of([7, 8, 9, 3, 2]))
    [range(7, 10), range(3, 4), range(2, 3)]
    """
    start = stop = -1
    for page in pages:
        if page != stop:
            if stop >= 0:
                yield range(start, stop)
            start = page
        stop = page + 1
    if stop >= 0:
        yield range(start, stop)


@dataclass(frozen=True)
class WorkingSet:
    """``runs`` of page numbers in the order of their first touch, each page once.

    ``identity`` is :data:`IDENTITY_SIZE` bytes by which the snapshot is known again,
    ``memory_pages`` how many pages its memory has.
    """

    identity: bytes
    memory_pages: int
    runs: tuple[range, ...]

    @property
    def pages(self) -> int:
        """How many pages were touched."""
        return sum(map(len, self.runs))

    def pack(self) -> bytes:
        """The file's content; raises :class:`ValueError` for what could not be read again."""
        _check(self.memory_pages, self.runs)
        if len(self.identity) != IDENTITY_SIZE:
            raise ValueError(f"its snapshot's identity is not {IDENTITY_SIZE} bytes")
        numbers = array("I")
        for run in self.runs:
            numbers.extend((run.start, len(run)))
        head = (SIGNATURE, VERSION, PAGE_SIZE, self.identity, self.memory_pages, len(self.runs))
        content = _HEAD.pack(*head) + _little(numbers).tobytes()
        return content + _digest(content)

    @classmethod
    def parse(cls, content: bytes) -> Self:
        """Read the file's content; raises :class:`ValueError` that says what is wrong with it."""
        if not looks_recorded(content):
            raise ValueError("it is not a working set")
        if len(content) < _HEAD.size + _DIGEST_SIZE:
            raise ValueError("it is cut off")
        _, version, page_size, identity, memory_pages, count = _HEAD.unpack_from(content)
        if version != VERSION:
            raise ValueError(f"its version is {version}; this program reads {VERSION}")
        end = _HEAD.size + count * _RUN_SIZE
        if len(content) != end + _DIGEST_SIZE:
            kind = "cut off" if len(content) < end + _DIGEST_SIZE else "too long"
            raise ValueError(f"it is {kind}, or its head is damaged")
        if _digest(content[:end]) != content[end:]:
            raise ValueError("it is damaged: it does not have its digest")
        if page_size != PAGE_SIZE:
            raise ValueError(f"its page size is {page_size}, and not {PAGE_SIZE}")
        numbers = array("I", content[_HEAD.size : end])
        pairs = iter(_little(numbers))
        runs = tuple(range(first, first + pages) for first, pages in zip(pairs, pairs, strict=True))
        _check(memory_pages, runs)
        return cls(identity, memory_pages, runs)


def _check(memory_pages: int, runs: Sequence[range]) -> None:
    """Whoever computes a digest can write any numbers: a pager must be able to rely on these."""
    if memory_pages > _MOST_PAGES:
        raise ValueError(f"its snapshot has {memory_pages} pages; {_MOST_PAGES} are the most")
    for run in runs:
        if not run or run.step != 1 or run.start < 0 or run.stop > memory_pages:
            raise ValueError(f"it has {len(run)} pages from {run.start} on, of {memory_pages}")
    for below, above in pairwise(sorted(runs, key=lambda run: run.start)):
        if below.stop > above.start:
            raise ValueError(f"it has page {above.start} twice")


def _little(numbers: array[int]) -> array[int]:
    """To or from the file's byte order."""
    if sys.byteorder == "big":
        numbers.byteswap()
    return numbers


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=_DIGEST_SIZE).digest()


class RecordingSource(SourceUpon):
    """``inner``, with the pages that were asked of it in the order in which they first were.

    A page that could not be had is among them: the guest wanted it.
    """

    def __init__(self, inner: PageSource) -> None:
        super().__init__(inner)
        self.size = inner.size
        self._seen = bytearray(inner.size // PAGE_SIZE)
        self._order = array("Q")

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See :class:`~guestfault.paging.source.base.PageSource`."""
        # Nobody else can be here with the same page: the pager has one thread fill it.
        for page in range(offset // PAGE_SIZE, -(-(offset + len(buffer)) // PAGE_SIZE)):
            if not self._seen[page]:
                self._seen[page] = 1
                self._order.append(page)
        self._inner.read_into(offset, buffer)

    def runs(self) -> tuple[range, ...]:
        """The order so far."""
        return tuple(runs_of(self._order))
