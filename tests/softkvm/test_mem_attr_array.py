"""Attributes by frame, against a list of them."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from guestfault.softkvm.mem_attr_array import MemAttrArray

FRAMES = 24
ranges = st.tuples(st.integers(0, FRAMES - 1), st.integers(1, FRAMES)).map(
    lambda r: (r[0], min(FRAMES, r[0] + r[1]))
)


@given(st.lists(st.tuples(ranges, st.sampled_from([0, 8])), max_size=12), ranges)
def test_any_changes(changes: list[tuple[tuple[int, int], int]], asked: tuple[int, int]) -> None:
    array, model = MemAttrArray(), [0] * (FRAMES + 1)
    for (start, end), attributes in changes:
        array.store_range(start, end, attributes)
        model[start:end] = [attributes] * (end - start)
        assert [array.load(index) for index in range(FRAMES + 1)] == model
    start, end = asked
    for attributes in (0, 8):
        alike = all(one == attributes for one in model[start:end])
        assert array.range_has(start, end, attributes) is alike
    borders = sum(one != other for one, other in itertools.pairwise(model))
    assert len(array) == borders + 1, "no two neighbours are alike"


def test_all_of_memory_is_one_entry() -> None:
    array = MemAttrArray()
    array.store_range(0, 1 << 52, 8)
    assert array.load(0) == array.load((1 << 52) - 1) == 8
    assert array.load(1 << 52) == 0
    assert len(array) == 2
