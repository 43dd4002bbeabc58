"""``guestfault run``: start a guest with none of its memory present, and bring every page in."""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from guestfault.errors import GuestfaultError
from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.snapshot import Snapshot, build, load
from guestfault.guest.walk import Walk
from guestfault.paging.source.file import FileSource
from guestfault.vmm.choice import KVMS, choose
from guestfault.vmm.report import Report, report
from guestfault.vmm.session import Mode, Session
from guestfault.vmm.text import as_text

__all__ = ["add_arguments", "main"]

_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}
DEFAULT_MEMORY = "64M"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's arguments."""
    parser.add_argument(
        "snapshot",
        nargs="?",
        metavar="SNAPSHOT",
        help="a directory that --save made; without it a built-in guest is made first",
    )
    parser.add_argument(
        "--kvm", choices=KVMS, default="auto", help="the real /dev/kvm or the software one"
    )
    parser.add_argument(
        "--dialect", metavar="NAME", help="which version of the interface the software KVM speaks"
    )
    parser.add_argument(
        "--mode",
        choices=[m.value for m in Mode],
        default=Mode.EXIT.value,
        help="exit: the failed access comes back to the vCPU's thread (default); "
        "uffd: the vCPU sleeps and a handler's thread serves it",
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
    parser.add_argument("--json", action="store_true", help="the report as JSON")


def main(args: argparse.Namespace) -> int:
    """Run the command.  0: the guest ended with the right results; 2: it did not."""
    mode = Mode(args.mode)
    with ExitStack() as stack:
        choice = choose(args.kvm, args.dialect, mode)
        stack.callback(choice.system.close)
        snapshot = stack.enter_context(_snapshot(args))
        if choice.why:
            _say(f"using {choice.system.name}: {choice.why}")
        source = FileSource(snapshot.open_memory())
        stack.callback(source.close)
        session = stack.enter_context(Session(choice.system, snapshot, source, mode))
        interrupted = False
        try:
            session.run(_Progress(session))
        except KeyboardInterrupt:
            interrupted = True
        result = report(session, time.monotonic() - session.began)
        _clear_line()
        print(json.dumps(result.as_json(), indent=2) if args.json else as_text(result))
        if interrupted:
            raise KeyboardInterrupt
        return _status(result)


def _status(result: Report) -> int:
    if result.failure is not None:
        raise RunFailedError(result.failure)
    if not result.right:
        raise RunFailedError(f"the guest ended with a {result.verdict}")
    return 0


class RunFailedError(GuestfaultError):
    """The run ended, and not with the right results."""


@contextmanager
def _snapshot(args: argparse.Namespace) -> Iterator[Snapshot]:
    made = ("memory", "vcpus", "walk", "guest", "seed", "save")
    if args.snapshot is not None:
        for name in made:
            if getattr(args, name) is not None:
                raise UsageError(f"--{name} is for a guest to be made; SNAPSHOT has its own")
        yield load(args.snapshot)
        return
    size = _memory_size(args.memory or DEFAULT_MEMORY)
    with tempfile.TemporaryDirectory(prefix="guestfault-") as scratch:
        path = Path(args.save) if args.save else Path(scratch) / "guest"
        _say(f"making a guest of {size >> 20} MiB" if size >= 1 << 20 else "making a guest")
        yield build(
            path,
            size,
            GuestMode(args.guest or GuestMode.LONG_CPL3),
            Walk(args.walk or Walk.SEQUENTIAL),
            args.vcpus or 1,
            args.seed or 0,
        )


class UsageError(GuestfaultError):
    """The command line asks for something that cannot be."""


def _memory_size(text: str) -> int:
    match = re.fullmatch(r"(\d+)([KMGT]?)(i?B)?", text, re.IGNORECASE)
    if match is None:
        raise UsageError(f"--memory {text}: write a size such as 64M or 1G")
    return int(match[1]) * _UNITS[match[2].upper()]


def _say(text: str) -> None:
    """A remark on what is being done, for a person: never mixed into the report."""
    print(f"guestfault: {text}", file=sys.stderr)


class _Progress:
    """One line that is written over and over, if a person watches."""

    def __init__(self, session: Session) -> None:
        self._session = session

    def __call__(self) -> None:
        if sys.stderr.isatty():
            done, pages = self._session.pager.pages_in, self._session.ram.pages
            line = f"{done} of {pages} pages in ({100 * done // pages} %)"
            print(f"\r{line:40}", end="", file=sys.stderr, flush=True)


def _clear_line() -> None:
    if sys.stderr.isatty():
        print(f"\r{'':40}\r", end="", file=sys.stderr, flush=True)
