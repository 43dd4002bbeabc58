"""What a recorded working set is worth: ``python benchmarks/restore.py``.

Restores the same guest over and over from a source that takes a while to answer each request, and
measures the time from the beginning of the restore to the guest's last checksum, on each KVM of
this machine and in both modes.  The ways are alternated, so that what else the machine does falls
upon all of them; given are the median, the spread, and the median of the ratios to the run on
demand of the same round.

on demand   every page by itself, when the guest needs it
around      the same, with up to 16 pages for one fault where the guest goes on in order
prefetch    by the order that a run recorded
half        by the first half of that order: a record that knows half of what the guest will touch
half, push  the same, and then all the rest as fast as it comes
push        no record at all, all of the memory as fast as it comes

The source waits ``--latency`` microseconds for each request, besides what reading the file takes;
reads overlap.  With ``--nbdkit`` it is a real server on loopback instead, nbdkit with its delay
filter, which waits for 1 ms, its least.
"""

from __future__ import annotations

import argparse
import gc
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from guestfault.cli.arguments import size_of
from guestfault.errors import GuestfaultError, Unavailable
from guestfault.guest.layout import Mode as GuestMode
from guestfault.guest.snapshot import Snapshot, build
from guestfault.guest.walk import Walk
from guestfault.kvm.protocols import System
from guestfault.kvm.system import KvmSystem
from guestfault.paging.around import DEFAULT_WINDOW, OFF
from guestfault.paging.prefetcher import AS_FAST_AS_IT_GOES, THREADS, Plan
from guestfault.paging.source.base import PageSource, SourceError, SourceUpon
from guestfault.paging.source.file import FileSource
from guestfault.paging.source.nbd import NbdSource
from guestfault.softkvm.system import SoftSystem
from guestfault.vmm.compiled import Loop
from guestfault.vmm.report import report
from guestfault.vmm.session import Mode, Session

Runs = tuple[range, ...]


class Restore(NamedTuple):
    """Seconds to the last checksum and to the first instruction; faults; pages asked for."""

    seconds: float
    first: float
    faults: int
    demanded: int


class Delayed(SourceUpon):
    """``inner``, each read of which takes ``seconds`` longer."""

    def __init__(self, inner: PageSource, seconds: float) -> None:
        super().__init__(inner)
        self.size = inner.size
        self._seconds = seconds

    def read_into(self, offset: int, buffer: memoryview) -> None:
        """See :class:`~guestfault.paging.source.base.PageSource`."""
        time.sleep(self._seconds)
        self._inner.read_into(offset, buffer)


def ways(runs: Runs, threads: int) -> dict[str, dict[str, object]]:
    """The arguments of a session for each way."""
    pages, half = sum(map(len, runs)) // 2, []
    for run in runs:
        half.append(run[: max(0, pages)])
        pages -= len(run)
    first = tuple(run for run in half if run)
    return {
        "on demand": {},
        "around": {"fault_around": DEFAULT_WINDOW},
        "prefetch": {"ahead": Plan(runs, threads)},
        "half": {"ahead": Plan(first, threads)},
        "half, push": {"ahead": Plan(first, threads, AS_FAST_AS_IT_GOES)},
        "push": {"ahead": Plan(push=AS_FAST_AS_IT_GOES)},
    }


@contextmanager
def restoring(
    system: System, taken: Snapshot, source: PageSource, mode: Mode, how: dict[str, object]
) -> Iterator[tuple[Session, Restore]]:
    """A session that has run to its right end, and what it took."""
    gc.collect()
    how = {"fault_around": OFF, **how}
    with Session(system, taken, source, mode, loop=Loop.PLAIN, **how) as session:  # type: ignore[arg-type]
        if not session.run():
            raise session.failure or GuestfaultError("the guest did not come to its end")
        seconds = time.monotonic() - session.began
        result = report(session, seconds)
        if result.verdict != "right":
            raise GuestfaultError(f"the guest ended with {result.verdict}")
        faults = result.userfaults + sum(
            v.annotated + v.bare + v.fetches + v.silent + v.ram_mmio for v in result.vcpus
        )
        yield session, Restore(seconds, result.first_instruction or 0, faults, result.demanded)


def compare(
    open_system: Callable[[], System],
    taken: Snapshot,
    source: PageSource,
    mode: Mode,
    rounds: int,
    threads: int,
) -> dict[str, list[Restore]]:
    """Record once, then all ways, round after round."""
    with closing(open_system()) as system:
        with restoring(system, taken, source, mode, {"record": True}) as (session, _):
            assert session.recording is not None
            runs = session.recording.runs()
        found: dict[str, list[Restore]] = {}
        for _ in range(rounds):
            for name, how in ways(runs, threads).items():
                with restoring(system, taken, source, mode, how) as (_, restore):
                    found.setdefault(name, []).append(restore)
        return found


def show(title: str, found: dict[str, list[Restore]]) -> None:
    print(f"\n{title}")
    print(f"{'':12}{'ms':>8}{'from - to':>16}{'of demand':>11}{'faults':>9}{'1st ms':>8}")
    base = found["on demand"]
    for name, runs in found.items():
        ms = [run.seconds * 1e3 for run in runs]
        ratio = statistics.median(
            run.seconds / other.seconds for run, other in zip(runs, base, strict=True)
        )
        faults = statistics.median(run.faults for run in runs)
        first = statistics.median(run.first * 1e3 for run in runs)
        spread = f"{min(ms):.0f} - {max(ms):.0f}"
        row = f"{statistics.median(ms):8.0f}{spread:>16}{ratio:11.2f}{faults:9.0f}{first:8.1f}"
        print(f"{name:12}{row}", flush=True)


@contextmanager
def nbdkit(path: Path) -> Iterator[PageSource]:
    """The file behind a real server, which answers no request in less than 1 ms."""
    with tempfile.TemporaryDirectory() as scratch:
        socket = Path(scratch) / "socket"
        command = ["nbdkit", "-f", "-r", "--filter=delay", "-U", str(socket), "file", str(path)]
        with subprocess.Popen([*command, "rdelay=1ms"]) as server:
            try:
                for _ in range(100):
                    try:
                        source = NbdSource(f"nbd+unix:///?socket={socket}")
                        break
                    except SourceError:
                        time.sleep(0.02)
                else:
                    raise Unavailable("nbdkit", "it does not come up")
                with closing(source):
                    yield source
            finally:
                server.terminate()


@contextmanager
def delayed(path: Path, seconds: float) -> Iterator[PageSource]:
    with closing(FileSource(os.open(path, os.O_RDONLY | os.O_CLOEXEC))) as inner:
        yield Delayed(inner, seconds)


def latency(source: PageSource) -> float:
    """What a page costs, in microseconds: the median of a hundred."""
    buffer, took = memoryview(bytearray(4096)), []
    for n in range(100):
        began = time.perf_counter()
        source.read_into(n * 4096, buffer)
        took.append(time.perf_counter() - began)
    return statistics.median(took) * 1e6


def systems() -> dict[str, Callable[[], System]]:
    found: dict[str, Callable[[], System]] = {"softkvm": lambda: SoftSystem("seed")}
    try:
        KvmSystem().close()
        found["/dev/kvm"] = KvmSystem
    except Unavailable as error:
        print(f"without /dev/kvm: {error}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", default="16M")
    parser.add_argument("--vcpus", type=int, default=1)
    parser.add_argument("--walk", choices=[walk.value for walk in Walk], action="append")
    parser.add_argument("--latency", type=float, default=200, help="microseconds for a request")
    parser.add_argument("--threads", type=int, default=THREADS)
    parser.add_argument("--nbdkit", action="store_true", help="a real server instead, with 1 ms")
    args = parser.parse_args()
    size = size_of("--memory", args.memory)
    with tempfile.TemporaryDirectory(prefix="restore-") as scratch:
        for walk in map(Walk, args.walk or ("sequential", "random")):
            path = Path(scratch) / walk.value
            taken = build(path, size, GuestMode.LONG_CPL3, walk, args.vcpus)
            memory = taken.memory_path
            opened = nbdkit(memory) if args.nbdkit else delayed(memory, args.latency * 1e-6)
            with opened as source:
                what = f"{walk.value} walk, {args.memory}, {args.vcpus} vCPU(s)"
                print(f"\n== {what}, a page costs {latency(source):.0f} us")
                for name, open_system in systems().items():
                    for mode in Mode:
                        title = f"{name}, mode {mode.value}"
                        try:
                            found = compare(
                                open_system, taken, source, mode, args.rounds, args.threads
                            )
                        except Unavailable as error:
                            print(f"\n{title}: {error}")
                        else:
                            show(title, found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
