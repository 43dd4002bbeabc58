from __future__ import annotations

import pytest

from guestfault.linux.units import bytes_text


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 bytes"),
        (1023, "1023 bytes"),
        (1024, "1 KiB"),
        (2 << 20, "2 MiB"),
        (3 << 29, "1.5 GiB"),
        (1 << 40, "1 TiB"),
        (1 << 52, "4096 TiB"),
    ],
)
def test_sizes_read_as_people_write_them(size: int, text: str) -> None:
    assert bytes_text(size) == text
