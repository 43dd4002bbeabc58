"""``guestfault snapshot``: make one compressed file of a snapshot, and a directory again."""

from __future__ import annotations

import argparse

from guestfault.cli.arguments import add_source_arguments, patience_of, size_of
from guestfault.guest.packed import open_snapshot, pack, unpack
from guestfault.paging.source.zstd_writer import DEFAULT_LEVEL

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True, dest="action")
    packing = actions.add_parser(
        "pack", help="write one file of it, compressed, that 'guestfault run' takes"
    )
    packing.add_argument("snapshot", metavar="SNAPSHOT", help="a directory that run --save made")
    packing.add_argument("file", metavar="FILE", help="the file to write")
    packing.add_argument(
        "--block-size",
        metavar="SIZE",
        default="64K",
        help="what is compressed, fetched and checked as one (default %(default)s)",
    )
    packing.add_argument(
        "--level", type=int, metavar="N", default=DEFAULT_LEVEL, help="zstd's (default %(default)s)"
    )
    unpacking = actions.add_parser("unpack", help="write a directory of it again")
    unpacking.add_argument("snapshot", metavar="SNAPSHOT", help="a packed file, or the URL of one")
    unpacking.add_argument("directory", metavar="DIR", help="the directory to write")
    add_source_arguments(unpacking)


def main(args: argparse.Namespace) -> int:
    """Run the command.  0: done."""
    if args.action == "pack":
        block_size = size_of("--block-size", args.block_size)
        with open_snapshot(args.snapshot) as opened:
            made = pack(opened, args.file, block_size, args.level)
        print(
            f"{args.file}: {made.file_size} bytes for {made.memory_size} of memory "
            f"({made.blocks} blocks, {made.zeros} of zeros, {made.copies} copies)"
        )
    else:
        with open_snapshot(args.snapshot, None, args.source_timeout, patience_of(args)) as opened:
            unpack(opened, args.directory)
    return 0
