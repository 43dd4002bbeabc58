from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from guestfault.paging import ahead
from guestfault.paging.ahead import EVERY, AheadCount, draw


@given(st.integers(0, 1000), st.integers(1, EVERY), st.data())
def test_of_every_so_many_pages_each_is_drawn_once(first: int, pages: int, data) -> None:
    """Invariant: whichever page it is, its chance is one in EVERY; nobody's own page has one."""
    run = range(first, first + pages)
    asked = data.draw(st.none() | st.sampled_from(run))
    drawn: Counter[int | None] = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for place in range(EVERY):
            patch.setattr(ahead, "randrange", lambda _n, place=place: place)
            drawn[draw(run, asked)] += 1
    none = drawn.pop(None, 0)
    assert drawn == {page: 1 for page in run if page != asked}
    assert none == EVERY - len(drawn)


@given(st.integers(0, 10_000), st.integers(0, 10_000))
def test_the_estimate_lies_in_its_span(wanted: int, others: int) -> None:
    assume(wanted + others)
    count = AheadCount(0, wanted + others, wanted)
    assert count.useful is not None
    assert count.useful_span is not None
    least, most = count.useful_span
    assert 0 <= least <= count.useful <= most + 1e-9 <= 1 + 1e-9
    more = AheadCount(0, 4 * (wanted + others), 4 * wanted).useful_span
    assert more is not None
    assert more[1] - more[0] < most - least


def test_the_span_of_a_published_example() -> None:
    """Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263 gives 0.2553 to 0.3662."""
    span = AheadCount(0, 263, 81).useful_span
    assert span is not None
    assert [round(bound, 4) for bound in span] == [0.2553, 0.3662]


def test_nothing_is_estimated_from_nothing() -> None:
    assert AheadCount(1000).useful is None
    assert AheadCount(1000).useful_span is None


def test_counts_add_up() -> None:
    count = AheadCount(10, 2, 1)
    count.add(AheadCount(5, 3, 2))
    assert count == AheadCount(15, 5, 3)
