"""Sizes as people read them."""

from __future__ import annotations

__all__ = ["bytes_text"]


def bytes_text(size: int) -> str:
    """A size in bytes with a binary unit and at most one decimal.

    >>> bytes_text(4096), bytes_text(1536 << 20)
    ('4 KiB', '1.5 GiB')
    """
    value, unit = float(size), "bytes"
    for larger in ("KiB", "MiB", "GiB", "TiB"):
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.1f}".removesuffix(".0") + f" {unit}"
