"""A histogram of latencies: fixed size, cheap to record, good to three percent at any scale.

Buckets are powers of two of nanoseconds, each divided into 32 equal parts, as in HdrHistogram
(http://hdrhistogram.org).  One thread records into one histogram; :meth:`LatencyHistogram.merge`
brings several together.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Self

__all__ = ["BUCKETS", "SUB_BITS", "LatencyHistogram"]

SUB_BITS = 5
_SUB = 1 << SUB_BITS
BUCKETS = (64 - SUB_BITS) * _SUB


def _index(ns: int) -> int:
    shift = max(0, ns.bit_length() - SUB_BITS - 1)
    return (shift << SUB_BITS) + (ns >> shift)


def _upper(index: int) -> int:
    """The largest value that falls into a bucket."""
    shift = max(0, (index >> SUB_BITS) - 1)
    return ((index - (shift << SUB_BITS) + 1) << shift) - 1


class LatencyHistogram:
    """Counts of nanoseconds.

    >>> h = LatencyHistogram()
    >>> for ns in (1000, 2000, 3000): h.record(ns)
    >>> h.count, h.percentile(50) // 100, h.max
    (3, 20, 3000)
    """

    __slots__ = ("_counts", "count", "max", "total")

    def __init__(self) -> None:
        self._counts = [0] * BUCKETS
        self.count = 0
        self.total = 0
        self.max = 0

    def record(self, ns: int) -> None:
        """Count one latency, in nanoseconds; below 0 counts as 0."""
        ns = max(ns, 0)
        self._counts[_index(ns)] += 1
        self.count += 1
        self.total += ns
        if ns > self.max:
            self.max = ns

    def add(self, counts: Iterable[int], total: int, maximum: int) -> None:
        """Take over what was counted elsewhere, in buckets like these: one count for each."""
        self._counts = [a + b for a, b in zip(self._counts, counts, strict=True)]
        self.count = sum(self._counts)
        self.total += total
        self.max = max(self.max, maximum)

    def percentile(self, percent: float) -> int:
        """The latency that ``percent`` of those recorded do not exceed; 0 if there are none.

        Never below the true value, and at most a 32nd above it.
        """
        rank = max(1, -(-self.count * percent // 100))
        seen = 0
        for index, n in enumerate(self._counts):
            seen += n
            if n and seen >= rank:
                return min(_upper(index), self.max)
        return 0

    def buckets(self) -> Iterator[tuple[int, int]]:
        """Each bucket that has something in it: the largest value that falls there, and how many.

        In ascending order.
        """
        for index, n in enumerate(self._counts):
            if n:
                yield _upper(index), n

    @classmethod
    def merge(cls, parts: Iterable[LatencyHistogram]) -> Self:
        """One histogram of everything that was recorded in ``parts``."""
        whole = cls()
        for part in parts:
            whole._counts = [a + b for a, b in zip(whole._counts, part._counts, strict=True)]
            whole.count += part.count
            whole.total += part.total
            whole.max = max(whole.max, part.max)
        return whole
