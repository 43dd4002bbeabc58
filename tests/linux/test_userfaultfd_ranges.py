"""The note of where a fault may sleep, against sets of pages."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from guestfault.linux import userfaultfd_ranges as ranges

BASE, PAGES = 1 << 46, 24

changes = st.lists(
    st.tuples(
        st.booleans(),
        st.integers(-3, -1),  # descriptors that nobody has
        st.integers(0, PAGES),
        st.integers(1, PAGES),
    ),
    max_size=12,
)


@given(changes)
def test_any_changes(steps: list[tuple[bool, int, int, int]]) -> None:
    noted: dict[int, set[int]] = {fd: set() for fd in (-3, -2, -1)}
    try:
        for add, fd, first, count in steps:
            pages = set(range(first, first + count))
            if add:
                ranges.note(fd, BASE + first, count)
                noted[fd] |= pages
            else:
                ranges.forget(fd, BASE + first, count)
                noted[fd] -= pages
            everywhere = set().union(*noted.values())
            for page in range(2 * PAGES):
                assert ranges.sleeps_at(BASE + page) is (page in everywhere)
    finally:
        for fd in noted:
            ranges.forget(fd)
    assert not any(ranges.sleeps_at(BASE + page) for page in range(2 * PAGES))
