"""Where the hidden segment state lies in a saved context."""

from __future__ import annotations

import pytest

from guestfault.softkvm.segment_cache import find_offset

BASE = 0x7A5C_93E1_0B4D_68F2


def test_the_record_begins_eight_bytes_before_its_base() -> None:
    context = bytes(96) + bytes(8) + BASE.to_bytes(8, "little") + bytes(200)
    assert find_offset(context, BASE) == 96


@pytest.mark.parametrize("times", [0, 2])
def test_a_base_that_is_not_there_exactly_once_is_another_version_of_unicorn(times: int) -> None:
    context = bytes(16) + (bytes(8) + BASE.to_bytes(8, "little")) * times + bytes(64)
    with pytest.raises(RuntimeError, match="this version of Unicorn"):
        find_offset(context, BASE)
