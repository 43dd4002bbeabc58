"""The attributes of guest frames, as ``struct kvm`` keeps them: ``kvm->mem_attr_array``.

The kernel's is an xarray, which is read without a lock while ``KVM_SET_MEMORY_ATTRIBUTES`` writes
it.  Here it is a pair of tuples, where the attributes change and to what, that is replaced as a
whole: whoever reads has one of the two, and a guest whose memory is all private costs one entry.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right

__all__ = ["MemAttrArray"]


class MemAttrArray:
    """``KVM_MEMORY_ATTRIBUTE_*`` by frame number, 0 everywhere at first.

    >>> attributes = MemAttrArray()
    >>> attributes.store_range(16, 32, 8)
    >>> attributes.load(31), attributes.load(32)
    (8, 0)
    """

    def __init__(self) -> None:
        # From starts[i] on up to the next start, the attributes are values[i].
        self._entries: tuple[tuple[int, ...], tuple[int, ...]] = (0,), (0,)

    def load(self, index: int) -> int:
        """The attributes of one frame."""
        starts, values = self._entries
        return values[bisect_right(starts, index) - 1]

    def range_has(self, start: int, end: int, attributes: int) -> bool:
        """Whether every frame of ``[start, end)`` has exactly these."""
        starts, values = self._entries
        first, last = bisect_right(starts, start) - 1, bisect_left(starts, end)
        return all(value == attributes for value in values[first:last])

    def store_range(self, start: int, end: int, attributes: int) -> None:
        """Give them to every frame of ``[start, end)``, which is not empty.  One writer at a time.

        Neighbours that are alike become one entry.
        """
        starts, values = self._entries
        first, last = bisect_left(starts, start), bisect_right(starts, end)
        changed = [
            *zip(starts[:first], values[:first], strict=True),
            (start, attributes),
            (end, values[last - 1]),
            *zip(starts[last:], values[last:], strict=True),
        ]
        kept: list[tuple[int, int]] = []
        for at, value in changed:
            if not kept or kept[-1][1] != value:
                kept.append((at, value))
        self._entries = tuple(at for at, _ in kept), tuple(value for _, value in kept)

    def __len__(self) -> int:
        """How many entries there are."""
        return len(self._entries[0])
