"""``guestfault check``: what this machine offers, and how to mend the rest.

Exit status 0, whatever is missing, unless the software KVM itself cannot run here: then 1.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys

from guestfault.check.finding import Status, Use
from guestfault.check.report import as_json, as_table
from guestfault.check.survey import survey

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``guestfault check``."""
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def main(args: argparse.Namespace) -> int:
    """Survey this machine and print what was found."""
    found = survey()
    if args.json:
        print(as_json(found))
    else:
        width = shutil.get_terminal_size().columns
        print(as_table(found, min(width, 100), _wants_colour()), end="")
    return 1 if found.ready[Use.SOFTWARE_KVM] is Status.MISSING else 0


def _wants_colour() -> bool:
    """Only a terminal gets colours, and only if its user did not say otherwise (no-color.org)."""
    return sys.stdout.isatty() and not os.environ.get("NO_COLOR")
