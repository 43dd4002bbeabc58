"""``guestfault explain``: what failed, from the register dump that a VMM left in a log."""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack

from guestfault.explain.account import account_for
from guestfault.explain.dump import parse_dumps
from guestfault.explain.errors import ExplainError
from guestfault.explain.image import MemoryImage
from guestfault.explain.report import as_json, as_text

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "file",
        nargs="?",
        default="-",
        metavar="FILE",
        help="text with the dump, as QEMU printed it or as someone pasted it; - is standard input",
    )
    parser.add_argument(
        "--memory",
        metavar="IMAGE",
        help="the guest's memory, to walk its page tables: raw from address 0 on, or the ELF file "
        "that dump-guest-memory writes",
    )
    parser.add_argument("--json", action="store_true", help="a JSON list with one object per dump")


def main(args: argparse.Namespace) -> int:
    """Run the command; raises :class:`ExplainError`, which ends it with status 2."""
    source = "standard input" if args.file == "-" else args.file
    dumps = parse_dumps(_read(args.file), source)
    with ExitStack() as stack:
        image = stack.enter_context(MemoryImage.open(args.memory)) if args.memory else None
        accounts = [account_for(dump, image) for dump in dumps]
    if args.json:
        print(json.dumps([as_json(account) for account in accounts], indent=2))
    else:
        total = len(accounts)
        print("\n\n".join(as_text(a, number=n, total=total) for n, a in enumerate(accounts, 1)))
    return 0


def _read(path: str) -> str:
    """The text, whatever its encoding: names and digits are ASCII, the rest does not matter."""
    try:
        if path == "-":
            data = sys.stdin.buffer.read()
        else:
            with open(path, "rb") as file:
                data = file.read()
    except (OSError, ValueError) as error:
        raise ExplainError(path, getattr(error, "strerror", None) or str(error)) from None
    encoding = "utf-16" if data[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8"
    return data.decode(encoding, "replace")
