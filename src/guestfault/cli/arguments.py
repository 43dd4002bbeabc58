"""Arguments that several commands take, and how their values are read."""

from __future__ import annotations

import argparse
import re

from guestfault.errors import GuestfaultError
from guestfault.paging.source.location import DEFAULT_TIMEOUT
from guestfault.paging.source.resilient import FOREVER, Patience

__all__ = [
    "UsageError",
    "add_source_arguments",
    "patience_of",
    "positive_number",
    "size_of",
    "window_of",
]

_WIDEST_WINDOW = 512  # pages
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


class UsageError(GuestfaultError):
    """The command line asks for something that cannot be."""


def size_of(option: str, text: str) -> int:
    """The bytes that ``64M`` means; raises :class:`UsageError`."""
    match = re.fullmatch(r"(\d+)([KMGT]?)(i?B)?", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"{option} {text}: not a size; write one such as 64M or 1G")
    return int(match[1]) * _UNITS[match[2].upper()]


def window_of(option: str, text: str) -> int:
    """The pages that ``16``, or ``off``, allows a fault; raises :class:`UsageError`."""
    if text == "off":
        return 1
    pages = int(text) if re.fullmatch(r"\d{1,9}", text) else 0
    if not 0 < pages <= _WIDEST_WINDOW or pages & (pages - 1):
        raise UsageError(
            f"{option} {text}: use off, or a power of two up to {_WIDEST_WINDOW}: a number of pages"
        )
    return pages


def add_source_arguments(parser: argparse.ArgumentParser) -> None:
    """How to deal with a source that is not here."""
    remote = parser.add_argument_group("a snapshot or memory that is at a URL")
    remote.add_argument(
        "--source-timeout",
        type=_positive,
        metavar="SECONDS",
        default=DEFAULT_TIMEOUT,
        help="what one request may take (default %(default)g)",
    )
    remote.add_argument(
        "--source-wait",
        type=_wait,
        metavar="SECONDS|forever",
        default=Patience().wait,
        help="how long to wait for a source that fails to come back, before all is stopped "
        "(default %(default)g; 0: stop at the first failure)",
    )


def patience_of(args: argparse.Namespace) -> Patience:
    """What :func:`add_source_arguments` declared."""
    return Patience(wait=args.source_wait)


def positive_number(text: str) -> int:
    """One or more, in decimal digits; for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: not a positive number")
    return int(text)


def _positive(text: str) -> float:
    seconds = float(text)
    if not 0 < seconds < FOREVER:
        raise ValueError
    return seconds


def _wait(text: str) -> float:
    if text == "forever":
        return FOREVER
    seconds = float(text)
    if not 0 <= seconds < FOREVER:
        raise ValueError
    return seconds


# What argparse calls them in a complaint: "invalid seconds value".
_positive.__name__ = _wait.__name__ = "seconds"
