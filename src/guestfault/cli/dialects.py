"""``guestfault dialects``: every published version of the interface, and what sets each apart."""

from __future__ import annotations

import argparse
import json

from guestfault.dialect.describe import as_json, details, table
from guestfault.dialect.published import DIALECTS, dialect_named

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument("name", nargs="?", metavar="NAME", help="everything about one of them")
    parser.add_argument("--json", action="store_true", help="the records as JSON")


def main(args: argparse.Namespace) -> int:
    """Run the command.  0; an unknown NAME is an error."""
    chosen = list(DIALECTS.values()) if args.name is None else [dialect_named(args.name)]
    if args.json:
        records = [as_json(dialect) for dialect in chosen]
        print(json.dumps(records if args.name is None else records[0], indent=2))
    elif args.name is None:
        print(table(chosen))
    else:
        print(details(chosen[0]))
    return 0
