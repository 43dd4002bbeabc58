"""What must hold of fault-around: ``python benchmarks/fewer_faults.py``, see ``--help``.

Each KVM of this machine, both modes, and the compiled loop where it can be had; a sequential and a
random walk, with windows of one page, of the default and of others, the order turned round from
round to round.  It prints, against one page at a time:

- how many times fewer faults the guest had (sequential, default: >= 5);
- how much faster it was, as the median over the rounds of the ratio within a round, with the least
  and the most (random, default: >= 0.97); and the same of the CPU seconds, which other processes on
  the machine disturb less;
- of the pages that came in ahead, which share was of use, by those that were withheld.

``control`` is one page at a time, run again as if it were another window: how far its ratio is from
1 is what this machine makes of no difference at all.  Every run is checked to the last byte.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from guestfault.cli.arguments import size_of
from guestfault.errors import GuestfaultError, Unavailable
from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.snapshot import Snapshot, build
from guestfault.guest.walk import Walk
from guestfault.kvm.protocols import System
from guestfault.kvm.system import KvmSystem
from guestfault.paging.ahead import Ahead, AheadCount
from guestfault.paging.around import DEFAULT_WINDOW, OFF
from guestfault.paging.source.file import FileSource
from guestfault.softkvm.system import SoftSystem
from guestfault.vmm.compiled import Loop
from guestfault.vmm.report import report
from guestfault.vmm.session import Mode, Session

WALKS = (Walk.SEQUENTIAL, Walk.RANDOM)
WINDOWS = (4, DEFAULT_WINDOW, 64)
CONTROL = 0  # stands for OFF, once more


@dataclass(frozen=True, slots=True)
class Place:
    """Where a guest runs, and by what."""

    name: str
    system: Callable[[], System]
    mode: Mode
    loop: Loop


@dataclass(slots=True)
class Cell:
    """The runs of one window."""

    seconds: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    faults: int = 0
    ahead: AheadCount = field(default_factory=AheadCount)


def places() -> Iterator[Place]:
    for name, system in (("softkvm", SoftSystem), ("/dev/kvm", KvmSystem)):
        for mode in Mode:
            yield Place(f"{name}, {mode.value}", system, mode, Loop.PLAIN)
    yield Place("/dev/kvm, exit, compiled", KvmSystem, Mode.EXIT, Loop.COMPILED)


def run(place: Place, taken: Snapshot, window: int, cell: Cell) -> None:
    """From the first instruction to the last checksum."""
    with (
        closing(place.system()) as system,
        closing(FileSource(taken.open_memory())) as source,
        Session(
            system, taken, source, place.mode, loop=place.loop, fault_around=window or OFF
        ) as session,
    ):
        began, cpu = time.perf_counter(), time.process_time()
        session.run()
        seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
        result = report(session, seconds)
        if not result.right:
            raise GuestfaultError(f"the guest ended with {result.verdict}: {result.failure}")
        cell.seconds.append(seconds)
        cell.cpu.append(cpu)
        cell.faults = sum(loop.resolver.account.faults for loop in session.vcpus)
        cell.faults += result.userfaults
        cell.ahead.add(session.pager.counts[Ahead.AROUND])


def measure(place: Place, taken: Snapshot, windows: Sequence[int], rounds: int) -> dict[int, Cell]:
    cells = {window: Cell() for window in (CONTROL, OFF, *windows)}
    run(place, taken, DEFAULT_WINDOW, Cell())  # compiled, and the caches warm
    for n in range(rounds):
        order = list(cells.items())
        first = n // 2 % len(order)  # nobody always comes after the same
        order = order[first:] + order[:first]
        for window, cell in order if n % 2 else reversed(order):
            run(place, taken, window, cell)
    return cells


def table(walk: Walk, cells: dict[int, Cell]) -> None:
    one = cells[OFF]
    for window, cell in cells.items():
        if window == OFF:
            continue
        speed = f"{ratio(one.seconds, cell.seconds):24}{ratio(one.cpu, cell.cpu):24}"
        name = "control" if window == CONTROL else str(window)
        span = cell.ahead.useful_span
        use = f"{100 * span[0]:.0f} to {100 * span[1]:.0f} %" if span else "-"
        fewer = f"{cell.faults:7}{one.faults / cell.faults:8.1f}"
        print(f"  {walk.value:11}{name:>8}{fewer}   {speed}{use}", flush=True)


def ratio(one: list[float], other: list[float]) -> str:
    each = [o / c for o, c in zip(one, other, strict=True)]
    return f"{median(each):6.2f} ({min(each):.2f} to {max(each):.2f})"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=9, help="default %(default)s")
    parser.add_argument("--size", default="64M", help="of the guest (default %(default)s)")
    parser.add_argument("--walk", action="append", choices=[walk.value for walk in WALKS])
    parser.add_argument("--window", action="append", type=int, metavar="PAGES")
    parser.add_argument("--place", default="", help="only those with this in their name")
    return parser.parse_args()


def main() -> int:
    args = arguments()
    size = size_of("--size", args.size)
    walks = [Walk(walk) for walk in args.walk or WALKS]
    with tempfile.TemporaryDirectory() as directory:
        guests = {
            walk: build(Path(directory) / walk.value, size, GuestMode.LONG_CPL3, walk)
            for walk in walks
        }
        for place in places():
            if args.place not in place.name:
                continue
            print(f"\n{place.name}, {args.rounds} rounds, {size >> 20} MiB")
            print(f"  walk{'window faults   fewer':>28}     faster{'less CPU':>25}{'of use':>22}")
            try:
                for walk, taken in guests.items():
                    table(walk, measure(place, taken, args.window or WINDOWS, args.rounds))
            except Unavailable as error:
                print(f"  not here: {error}")
            except GuestfaultError as error:
                print(f"fewer_faults: {error}", file=sys.stderr)
                return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
