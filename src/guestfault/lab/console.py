"""What a kernel wrote on its console, and the lines of it that say how it fared."""

from __future__ import annotations

import re

__all__ = ["first_trouble", "last_line", "lines", "panic", "warnings"]

_STAMP = re.compile(r"^(<\d+>)?\[\s*\d+\.\d+\](\[\s*[TC]\d+\])?\s?")
_ESCAPE = re.compile(r"\x1b(\[[0-9;?]*[A-Za-z]|c)")
_PANIC = re.compile(r"Kernel panic - not syncing: (.*)")
_TROUBLE = re.compile(r"(BUG: .*|Oops: .*|general protection fault.*|kernel BUG at .*)")
_WARNING = re.compile(r"(WARNING: .* at .*)")


def lines(console: bytes | bytearray) -> list[str]:
    """Its lines, without stamps, the firmware's escape sequences and empty ones."""
    text = _ESCAPE.sub("", console.decode("utf-8", "replace")).replace("\r", "\n")
    found = (_STAMP.sub("", line).strip() for line in text.split("\n"))
    return [line for line in found if line]


def _first(pattern: re.Pattern[str], console: bytes | bytearray) -> str:
    for line in lines(console):
        if match := pattern.search(line):
            return match[1].strip()
    return ""


def panic(console: bytes | bytearray) -> str:
    """Why the kernel panicked, in its own words; empty if it did not."""
    return _first(_PANIC, console)


def first_trouble(console: bytes | bytearray) -> str:
    """The first oops or failed assertion; a panic often only follows from it."""
    return _first(_TROUBLE, console)


def warnings(console: bytes | bytearray) -> list[str]:
    """The places that warned (``WARN_ON`` and its kind), in order."""
    return [match[1] for line in lines(console) if (match := _WARNING.search(line))]


def last_line(console: bytes | bytearray) -> str:
    """Its last line; empty if there is none."""
    return next(reversed(lines(console)), "")
