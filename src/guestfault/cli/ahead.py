"""The arguments of ``guestfault run`` for what is recorded, prefetched and pushed."""

from __future__ import annotations

import argparse
import sys

from guestfault.cli.arguments import UsageError, size_of
from guestfault.guest.recorded import check_replaceable, load_recorded, save_recorded
from guestfault.guest.snapshot import Snapshot
from guestfault.paging.prefetcher import AS_FAST_AS_IT_GOES, THREADS, Plan
from guestfault.vmm.compiled import Loop
from guestfault.vmm.session import Session

__all__ = ["add_ahead_arguments", "check_ahead_arguments", "keep_record", "plan_of"]

_MOST_THREADS = 64


def add_ahead_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare them."""
    ahead = parser.add_argument_group("pages that come in before they are asked for")
    ahead.add_argument(
        "--record",
        metavar="FILE",
        help="keep there which pages the guest touched, in the order of their first touch",
    )
    ahead.add_argument(
        "--prefetch",
        metavar="FILE",
        help="bring in the pages that --record kept there, in that order, while the guest runs",
    )
    ahead.add_argument(
        "--prefetch-threads",
        type=int,
        metavar="N",
        help=f"how many of its reads may be under way at a time (default {THREADS})",
    )
    ahead.add_argument(
        "--push",
        metavar="RATE",
        help="then bring in all the rest, while the guest runs, at no more than RATE bytes a "
        "second, such as 200M, or max",
    )


def check_ahead_arguments(args: argparse.Namespace) -> None:
    """Raises what is wrong with them, as far as it can be said before there is a snapshot."""
    threads = args.prefetch_threads
    if args.record is not None:
        if args.prefetch is not None or args.push is not None:
            other = "--prefetch" if args.prefetch is not None else "--push"
            why = "whether a page was touched is not seen if it is there already"
            raise UsageError(f"--record and {other}: {why}; use one of them")
        if args.loop == Loop.COMPILED.value:
            raise UsageError("--record and --loop compiled: the compiled loop keeps no record")
        check_replaceable(args.record)
    if threads is not None:
        if args.prefetch is None:
            raise UsageError("--prefetch-threads is for --prefetch FILE, and none is given")
        if not 0 < threads <= _MOST_THREADS:
            raise UsageError(f"--prefetch-threads {threads}: use 1 to {_MOST_THREADS}")
    _rate_of(args.push)


def plan_of(args: argparse.Namespace, snapshot: Snapshot) -> Plan | None:
    """What to bring in ahead; raises :class:`~guestfault.guest.recorded.WorkingSetError`."""
    if args.prefetch is None and args.push is None:
        return None
    recorded = None if args.prefetch is None else load_recorded(args.prefetch, snapshot)
    runs = recorded.runs if recorded is not None else ()
    return Plan(runs, args.prefetch_threads or THREADS, _rate_of(args.push))


def keep_record(args: argparse.Namespace, session: Session) -> None:
    """After a run, also of one that was interrupted: write what was recorded."""
    if session.recording is None:
        return
    runs = session.recording.runs()
    if not runs:
        print(f"guestfault: no page was touched; {args.record} is not written", file=sys.stderr)
        return
    kept = save_recorded(args.record, session.snapshot, runs)
    ended = all(loop.console.done for loop in session.vcpus)
    so_far = "" if ended else ", though the guest did not come to its end"
    print(f"guestfault: {kept.pages} pages recorded in {args.record}{so_far}", file=sys.stderr)


def _rate_of(text: str | None) -> float | None:
    if text is None or text == "max":
        return None if text is None else AS_FAST_AS_IT_GOES
    rate = size_of("--push", text)
    if not rate:
        raise UsageError(f"--push {text}: nothing would ever come in; leave it out")
    return rate
