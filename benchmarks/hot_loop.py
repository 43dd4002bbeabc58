"""What must hold of the compiled loop: ``python benchmarks/hot_loop.py [ROUNDS [PAGES]]``.

On this machine's ``/dev/kvm``, with tracefs, in alternating rounds of one guest each:

- the exit way over the userfaultfd way, both compiled; and the same of the equal loops in C
  (``hot_loop.c``), which says what the machine gives, whoever writes the loop;
- two vCPUs over one, exit way;
- the loops that numba compiled over those in C;
- what the loop takes per fault besides the system calls (in rounds of its own, which are timed);
- what a fault is made of.  By the exit way: a KVM_RUN in which KVM maps the page before and fails
  at the next, the page let in, the loop.  By userfaultfd there is no such return to user space, but
  a vCPU that falls asleep, a reader that wakes, and the same backwards.

Each figure is the median over the rounds of the ratio within a round, with the least and the most.
``elsewhere`` is how much of the machine other processes had: with much of that, the two ways are
not slowed alike, and the ratios of their rates say little.  CPU time suffers less from company.
In the lab ``elsewhere`` is of the emulated machine: look at this one's load, too.

In the lab there is no C compiler, so the loops in C are compiled here and taken along::

    python benchmarks/hot_loop.py --build /tmp/hot_loop.so
    guestfault lab run --kernel 6.12 --smp 2 --with-numba --timeout 900 --add benchmarks:/b \\
        --add /tmp/hot_loop.so:/hot_loop.so -- python3 /b/hot_loop.py --c-library /hot_loop.so
"""

from __future__ import annotations

import argparse
import errno
import os
import sys
import tempfile
from collections import defaultdict
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TypeAlias

from guestfault.bench.compiled import NUMBA, CompiledEngine
from guestfault.bench.experiment import ExperimentError, is_done, run_once
from guestfault.bench.machine import Machine
from guestfault.bench.shape import Fault, Run, Shape, Way
from guestfault.errors import GuestfaultError
from guestfault.fault.locate.tracepoint import TracepointLocator, gpa_from
from guestfault.kvm import KvmSystem
from guestfault.kvm.vcpu import KvmVcpu
from guestfault.paging import hot
from guestfault.paging import hot_words as at
from guestfault.paging.hot_loop import blank_words, describe_memory
from hot_c import CLoops, build

_TIMES = 2000  # how often a KVM_RUN is repeated

Runs: TypeAlias = dict[str, list[Run]]
Parts: TypeAlias = dict[str, list[float]]


def main() -> int:
    args = arguments()
    if args.build:
        build(args.build)
        return 0
    try:
        with tempfile.TemporaryDirectory() as directory, closing(KvmSystem()) as system:
            library = args.c_library or Path(directory, "hot_loop.so")
            if args.c_library is None:
                build(library)
            bench = Bench(system, CLoops(library), args.rounds, args.pages, args.vcpus)
            bench.warm()
            for fault in args.fault or Fault:
                bench.measure(fault)
    except GuestfaultError as error:
        print(f"hot_loop: {error}", file=sys.stderr)
        return 2
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    parser.add_argument("rounds", nargs="?", type=int, default=9)
    parser.add_argument("pages", nargs="?", type=int, default=8192)
    parser.add_argument("--fault", type=Fault, action="append", choices=list(Fault))
    parser.add_argument("--vcpus", type=int, default=min(2, os.cpu_count() or 1), help="1 or 2")
    parser.add_argument("--build", type=Path, metavar="FILE", help="only compile the loops in C")
    parser.add_argument("--c-library", type=Path, metavar="FILE", help="they are compiled already")
    return parser.parse_args()


@dataclass(frozen=True)
class Bench:
    """All that is measured, with faults of one kind at a time."""

    system: KvmSystem
    c: CLoops
    rounds: int
    pages: int
    vcpus: int

    def warm(self) -> None:
        """Compile, and fill the caches."""
        engine = CompiledEngine(self.system, NUMBA)
        self._run(engine, Way.EXIT, 1, Fault.MINOR)
        self._run(engine, Way.UFFD, 1, Fault.MISSING)

    def measure(self, fault: Fault) -> None:
        """The rounds, and their table."""
        engines = {
            "compiled": CompiledEngine(self.system, NUMBA),
            "C": CompiledEngine(self.system, self.c.functions),
        }
        cells: list[tuple[str, CompiledEngine, Way, int]] = [
            (f"{name} {way} {vcpus}", engine, way, vcpus)
            for vcpus in range(1, self.vcpus + 1)
            for way in Way
            for name, engine in engines.items()
        ]
        cells.append(("timed", CompiledEngine(self.system, NUMBA, timed=True), Way.EXIT, 1))
        runs: Runs = defaultdict(list)
        parts: Parts = defaultdict(list)
        for n in range(self.rounds):
            for name, engine, way, vcpus in cells if n % 2 else reversed(cells):
                runs[name].append(self._run(engine, way, vcpus, fault))
            for name, us in self._parts(fault).items():
                parts[name].append(us)
        print(f"\n{fault.value} faults, {self.rounds} rounds{'':33}median   least to most")
        show_ratios(runs, self.vcpus)
        show_parts(runs, parts)
        print(
            spread(
                "elsewhere, of the machine", [r.elsewhere for each in runs.values() for r in each]
            )
        )

    def _run(self, engine: CompiledEngine, way: Way, vcpus: int, fault: Fault) -> Run:
        shape = Shape(way, vcpus, self.pages, fault, readers=vcpus)
        return run_once(self.system, shape, engine)

    def _parts(self, fault: Fault) -> dict[str, float]:
        """What a fault is made of, in us: each repeated alone."""
        with Machine(self.system, Shape(Way.EXIT, 1, self.pages, fault)) as machine:
            (share,) = machine.shares
            vcpu = share.vcpu
            assert isinstance(vcpu, KvmVcpu)

            def kvm_run(times: int, expected: int) -> float:
                ns = vcpu.run_by(lambda fd: self.c.round_trips(fd, times, expected))
                return checked(ns, "KVM_RUN") / times / 1e3

            found = {}
            vcpu.kvm_run.immediate_exit = 1
            found["KVM_RUN that does not enter the guest"] = kvm_run(_TIMES, errno.EINTR)
            vcpu.kvm_run.immediate_exit = 0
            found["KVM_RUN that fails: -EFAULT"] = kvm_run(_TIMES, errno.EFAULT)
            with TracepointLocator(self.system, translate=gpa_from(vcpu), slots=machine.slots):
                name = "the same, traced as the exit way has it"
                found[name] = kvm_run(_TIMES, errno.EFAULT)
            words = words_for(machine)
            first, half = share.pages.start, self.pages // 2

            def walk(fd: int) -> int:
                words[at.VCPU_FD] = fd
                return self.c.walk(words, first, half)

            ns = checked(vcpu.run_by(walk), "a walk")
            found["KVM_RUN that maps a page and fails at the next"] = ns / half / 1e3
            name = "UFFDIO_CONTINUE" if fault is Fault.MINOR else "UFFDIO_COPY"
            ns = self.c.let_in(words, first + half, self.pages - half)
            found[name] = checked(ns, name) / (self.pages - half) / 1e3
            # In one KVM_RUN each of these is touched; KVM may map its neighbours along with it.
            found["a page that is in, touched"] = kvm_run(1, 0) / (self.pages - half)
            if not is_done(vcpu):
                raise ExperimentError(f"the guest left for exit reason {vcpu.kvm_run.exit_reason}")
            found["KVM_RUN that ends with port I/O, to compare"] = kvm_run(_TIMES, 0)
            return found


def words_for(machine: Machine) -> hot.Words:
    words = blank_words(1)
    describe_memory(words, machine.ram, machine.slots)
    words[at.UFFD] = machine.uffds[0].fileno()
    words[at.SOURCE] = at.SOURCE_NONE
    if machine.source is not None:
        words[at.SOURCE], words[at.SOURCE_AT] = at.SOURCE_MEMORY, machine.source.address
    return words


def checked(ns: int, name: str) -> int:
    if ns < 0:
        raise ExperimentError(f"{name} did not end as it must")
    return ns


def show_ratios(runs: Runs, most: int) -> None:
    def ratio(above: str, below: str) -> list[float]:
        return [a.rate / b.rate for a, b in zip(runs[above], runs[below], strict=True)]

    for n in range(1, most + 1):
        ours, theirs = (
            ratio(f"compiled exit {n}", f"compiled uffd {n}"),
            ratio(f"C exit {n}", f"C uffd {n}"),
        )
        print(spread(f"exit over uffd, compiled, {n} vCPU (>= 1.8 at 1)", ours))
        print(spread(f"exit over uffd, C, {n} vCPU", theirs))
        gains = [a / b for a, b in zip(ours, theirs, strict=True)]
        print(spread(f"compiled's gain over C's, {n} vCPU", gains))
    for n in range(1, most + 1):
        for way, must in ((Way.EXIT, " (>= 0.95)"), (Way.UFFD, "")):
            name = f"compiled over C, {way}, {n} vCPU{must}"
            print(spread(name, ratio(f"compiled {way} {n}", f"C {way} {n}")))
            pairs = zip(runs[f"C {way} {n}"], runs[f"compiled {way} {n}"], strict=True)
            name = f"  the same by CPU time, {way}, {n} vCPU"
            print(spread(name, [c.cpu_seconds / ours.cpu_seconds for c, ours in pairs]))
    if most > 1:
        name = "two vCPUs over one, exit, compiled (>= 1.8)"
        print(spread(name, ratio("compiled exit 2", "compiled exit 1")))


def show_parts(runs: Runs, parts: Parts) -> None:
    print("us per fault and vCPU")
    for name, each in sorted(runs.items()):
        us = [1e6 * run.shape.vcpus / run.rate for run in each]
        print(spread(f"  {name}", us, "6.1f"))
    print("CPU us per fault, of all threads")
    for name, each in sorted(runs.items()):
        print(spread(f"  {name}", [run.cpu_per_million for run in each], "6.1f"))
    print("us, alone")
    for name, values in parts.items():
        print(spread(f"  {name}", values, "6.1f"))
    outside = [(run.outside_ns or 0) / 1e3 for run in runs["timed"]]
    print(spread("  the compiled loop, outside the kernel (<= 1)", outside))


def spread(name: str, values: list[float], form: str = "6.2f") -> str:
    low, middle, high = min(values), median(values), max(values)
    return f"{name:54}{middle:{form}}   {low:{form}} to {high:{form}}"


if __name__ == "__main__":
    sys.exit(main())
