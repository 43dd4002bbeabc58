from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.paging.histogram import LatencyHistogram

LATENCIES = st.integers(0, 2**62) | st.integers(0, 100_000)
SOME = st.lists(LATENCIES, min_size=1, max_size=60)
PERCENTS = st.integers(1, 100) | st.floats(0.01, 100)


def recorded(values: list[int]) -> LatencyHistogram:
    histogram = LatencyHistogram()
    for ns in values:
        histogram.record(ns)
    return histogram


@given(SOME, PERCENTS)
def test_a_percentile_is_never_below_the_true_value_and_at_most_a_32nd_above(
    values: list[int], percent: float
) -> None:
    rank = max(1, math.ceil(len(values) * percent / 100))
    true = sorted(values)[rank - 1]
    told = recorded(values).percentile(percent)
    assert true <= told <= true + true // 32


@given(SOME)
def test_the_hundredth_percentile_is_the_maximum(values: list[int]) -> None:
    assert recorded(values).percentile(100) == max(values)


@given(st.lists(st.lists(LATENCIES, max_size=20), max_size=5))
def test_merging_is_recording_everything_in_one(parts: list[list[int]]) -> None:
    merged = LatencyHistogram.merge(map(recorded, parts))
    whole = recorded([ns for part in parts for ns in part])
    for name in ("count", "total", "max"):
        assert getattr(merged, name) == getattr(whole, name)
    assert [merged.percentile(p) for p in range(101)] == [whole.percentile(p) for p in range(101)]


@given(SOME)
def test_count_total_and_max_are_exact(values: list[int]) -> None:
    histogram = recorded(values)
    assert (histogram.count, histogram.total, histogram.max) == (
        len(values),
        sum(values),
        max(values),
    )


def test_nothing_recorded_is_zero() -> None:
    assert LatencyHistogram().percentile(99) == 0


@pytest.mark.parametrize("ns", [-1, -(10**9)])
def test_a_clock_that_went_backwards_counts_as_zero(ns: int) -> None:
    histogram = recorded([ns])
    assert (histogram.count, histogram.percentile(50), histogram.total) == (1, 0, 0)
