"""``guestfault run``: start a guest with none of its memory present, and bring every page in."""

from __future__ import annotations

import argparse
import json
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from guestfault.cli.ahead import (
    add_ahead_arguments,
    check_ahead_arguments,
    keep_record,
    plan_of,
)
from guestfault.cli.arguments import (
    UsageError,
    add_source_arguments,
    patience_of,
    size_of,
    window_of,
)
from guestfault.cli.transient import transient
from guestfault.errors import GuestfaultError
from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.packed import OpenSnapshot, open_snapshot
from guestfault.guest.snapshot import build
from guestfault.guest.walk import Walk
from guestfault.paging.around import DEFAULT_WINDOW
from guestfault.paging.source.base import PageSource, trouble
from guestfault.vmm.choice import KVMS, choose
from guestfault.vmm.compiled import PAYS_AFTER, Loop
from guestfault.vmm.report import report
from guestfault.vmm.session import Mode, Session
from guestfault.vmm.text import as_text

__all__ = ["add_arguments", "main"]

DEFAULT_MEMORY = "64M"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "snapshot",
        nargs="?",
        metavar="SNAPSHOT",
        help="a directory that --save made, a file that 'guestfault snapshot pack' made, or the "
        "URL of such a file; without it a built-in guest is made first",
    )
    parser.add_argument(
        "--memory-from",
        metavar="WHERE",
        help="read SNAPSHOT's memory from there instead: a path, http://, https://, nbd:// or "
        "nbd+unix://, of raw memory or of a packed snapshot",
    )
    parser.add_argument(
        "--kvm", choices=KVMS, default="auto", help="the real /dev/kvm or the software one"
    )
    parser.add_argument(
        "--dialect",
        metavar="NAME",
        help="which version of the interface the KVM speaks; 'guestfault dialects' lists them",
    )
    parser.add_argument(
        "--npt",
        type=int,
        choices=(0, 1),
        help="0: the software KVM keeps shadow page tables, as one loaded with npt=0 (ept=0) does",
    )
    parser.add_argument(
        "--mode",
        choices=[m.value for m in Mode],
        default=Mode.EXIT.value,
        help="exit: the failed access comes back to the vCPU's thread (default); "
        "uffd: the vCPU sleeps and a handler's thread serves it",
    )
    parser.add_argument(
        "--verify", action="store_true", help="first read all of the memory, and check its digest"
    )
    parser.add_argument(
        "--locate",
        choices=("all", "kernel"),
        default="all",
        help="who may name a failed access: all the locators (default), or the kernel alone, "
        "so that a bare -EFAULT ends the run as it does in other VMMs",
    )
    parser.add_argument(
        "--loop",
        choices=[loop.value for loop in Loop],
        default=Loop.AUTO.value,
        help="who resolves failed accesses: plain Python, the compiled loop (which takes numba and "
        "the real KVM), or auto: the compiled one where it can be had and pays (default)",
    )
    parser.add_argument(
        "--fault-around",
        metavar="off|PAGES",
        default=str(DEFAULT_WINDOW),
        help="how many pages may come in for one fault, where a guest goes through its memory in "
        "order (default %(default)s)",
    )
    made = parser.add_argument_group("the guest to make, where no SNAPSHOT is given")
    made.add_argument("--memory", metavar="SIZE", help=f"such as 64M (default {DEFAULT_MEMORY})")
    made.add_argument("--vcpus", type=int, metavar="N", help="default 1")
    made.add_argument("--walk", choices=[w.value for w in Walk], help="how it goes over its pages")
    made.add_argument(
        "--guest", choices=[m.value for m in GuestMode], help="the processor mode it runs in"
    )
    made.add_argument("--seed", type=int, metavar="N", help="of its memory's content")
    made.add_argument("--save", metavar="DIR", help="keep the snapshot there")
    add_ahead_arguments(parser)
    add_source_arguments(parser)
    parser.add_argument("--json", action="store_true", help="the report as JSON")


def main(args: argparse.Namespace) -> int:
    """Run the command.  0: the guest ended with the right results; 2: it did not; 130: Ctrl-C."""
    mode = Mode(args.mode)
    fault_around = window_of("--fault-around", args.fault_around)
    check_ahead_arguments(args)
    with ExitStack() as stack:
        npt = None if args.npt is None else args.npt == 1
        choice = choose(args.kvm, args.dialect, npt)
        stack.callback(choice.system.close)
        opened = stack.enter_context(_snapshot(args))
        if args.verify:
            opened.snapshot.verify_memory(opened.source)
        if choice.why:
            print(f"guestfault: using {choice.system.name}: {choice.why}", file=sys.stderr)
        session = stack.enter_context(
            Session(
                choice.system,
                opened.snapshot,
                opened.source,
                mode,
                dialect=choice.dialect,
                locate=args.locate == "all",
                loop=Loop(args.loop),
                fault_around=fault_around,
                ahead=plan_of(args, opened.snapshot),
                record=args.record is not None,
            )
        )
        if session.recording is not None:
            says = "recording: every page comes in by itself, by the plain loop"
            print(f"guestfault: {says}", file=sys.stderr)
        watch = stack.enter_context(_Watch(session, opened.source))
        session.run(watch)
        result = report(session, time.monotonic() - session.began)
        transient("")
        if session.why_plain is not None and any(v.bare >= PAYS_AFTER for v in result.vcpus):
            print(f"guestfault: by the plain loop: {session.why_plain}", file=sys.stderr)
        print(json.dumps(result.as_json(), indent=2) if args.json else as_text(result))
        keep_record(args, session)
        if watch.interrupted:
            raise KeyboardInterrupt
    if result.failure is not None:
        raise RunFailedError(result.failure)
    if not result.right:
        why = f"the guest ended with {result.verdict}"
        raise RunFailedError(f"{why}; --verify tells whether its snapshot is damaged")
    return 0


class RunFailedError(GuestfaultError):
    """The run ended, and not with the right results."""


@contextmanager
def _snapshot(args: argparse.Namespace) -> Iterator[OpenSnapshot]:
    made = ("memory", "vcpus", "walk", "guest", "seed", "save")
    if args.snapshot is not None:
        for name in made:
            if getattr(args, name) is not None:
                raise UsageError(f"--{name} is for a guest to be made; SNAPSHOT has its own")
        wait = patience_of(args)
        with open_snapshot(args.snapshot, args.memory_from, args.source_timeout, wait) as opened:
            yield opened
        return
    if args.memory_from is not None:
        raise UsageError("--memory-from is for the memory of a SNAPSHOT, and none is given")
    size = size_of("--memory", args.memory or DEFAULT_MEMORY)
    with tempfile.TemporaryDirectory(prefix="guestfault-") as scratch:
        path = Path(args.save) if args.save else Path(scratch) / "guest"
        transient("making a guest")
        try:
            build(
                path,
                size,
                GuestMode(args.guest or GuestMode.LONG_CPL3),
                Walk(args.walk or Walk.SEQUENTIAL),
                1 if args.vcpus is None else args.vcpus,
                args.seed or 0,
            )
        finally:
            transient("")
        with open_snapshot(path) as opened:
            yield opened


class _Watch:
    """Looks after a running session: shows how far it is, and stops it for Ctrl-C.

    Ctrl-C is only noted where it strikes, and acted upon here: so it interrupts nothing half done,
    however often it comes, and the report is still made.
    """

    def __init__(self, session: Session, source: PageSource) -> None:
        self._session = session
        self._source = source
        self._waiting = False
        self.interrupted = False

    def __call__(self) -> None:
        if self.interrupted:
            self._session.stop()
        self._tell_of_the_source()
        done, pages = self._session.pager.pages_in, self._session.ram.pages
        transient(f"{done} of {pages} pages in ({100 * done // pages} %)")

    def _tell_of_the_source(self) -> None:
        """Once when it is waited for, and once when it is back."""
        why = trouble(self._source)
        if self._waiting != (why is not None):
            self._waiting = not self._waiting
            transient("")
            says = "the source is back" if why is None else f"waiting for the source: {why.why}"
            print(f"guestfault: {says}", file=sys.stderr, flush=True)

    def _note(self, _signal: int, _frame: object) -> None:
        self.interrupted = True

    def __enter__(self) -> Self:
        self._before = signal.getsignal(signal.SIGINT)
        if self._before is not signal.SIG_IGN:  # whoever started us may want it so
            signal.signal(signal.SIGINT, self._note)
        return self

    def __exit__(self, *_error: object) -> None:
        signal.signal(signal.SIGINT, self._before)
