"""The line that says how far long work is: for a person who watches, and gone with the next one."""

from __future__ import annotations

import shutil
import sys

__all__ = ["transient"]


def transient(text: str) -> None:
    """Show ``text`` in the place of the last; nothing, to leave nothing of it.

    On standard error, cut to the terminal's width, and only if that is a terminal.
    """
    if sys.stderr.isatty():
        width = shutil.get_terminal_size().columns - 1
        print(f"\r{text[:width]}\x1b[K", end="", file=sys.stderr, flush=True)
