"""What must hold of the compiled loop: ``python benchmarks/hot_loop.py [ROUNDS [PAGES]]``.

On this machine's ``/dev/kvm``, with tracefs, in alternating rounds of one guest each:

- the exit way over the userfaultfd way, both compiled, 1 vCPU;
- two vCPUs over one, exit way;
- the loop that numba compiled over an equal one in C (``hot_loop.c``), 1 and 2 vCPUs;
- what the loop takes per fault besides the system calls (in rounds of its own, which are timed).

Each figure is the median over the rounds of the ratio within a round, with the least and the most.
``elsewhere`` is how much of the machine other processes had: with much of that, the two ways are
not slowed alike, and the figures say little.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from statistics import median

from guestfault.bench.compiled import NUMBA, CompiledEngine, Functions
from guestfault.bench.experiment import run_once
from guestfault.bench.shape import Fault, Run, Shape, Way
from guestfault.errors import GuestfaultError
from guestfault.kvm import KvmSystem
from guestfault.paging import hot, hot_words
from guestfault.paging.histogram import SUB_BITS
from guestfault.uapi import kvm, userfaultfd


def in_c(directory: str) -> Functions:
    """Compile hot_loop.c for the words as they are."""
    names = {n: v for n, v in vars(hot_words).items() if n.isupper() and isinstance(v, int)}
    names |= {
        "SUB_BITS": SUB_BITS,
        "SREGS_OFFSET": kvm.kvm_run.s.offset + kvm.kvm_sync_regs.sregs.offset,
        "UFFDIO_CONTINUE_": userfaultfd.UFFDIO_CONTINUE,  # older headers have none
    }
    library = f"{directory}/hot_loop.so"
    source = Path(__file__).with_suffix(".c")
    defines = [f"-D{name}={value}L" for name, value in names.items()]
    command = ["cc", "-O2", "-Wall", "-shared", "-fPIC", *defines, str(source), "-o", library]
    subprocess.run(command, check=True)
    loaded = ctypes.CDLL(library)  # lets go of the GIL for a call

    def call(name: str) -> Callable[[hot.Words, hot.Words], int]:
        function = getattr(loaded, name)
        function.restype = ctypes.c_int64
        function.argtypes = [ctypes.c_int64, ctypes.c_int64]
        return lambda words, histogram: function(words.ctypes.data, histogram.ctypes.data)

    return Functions("C", call("hot_run"), call("hot_serve"))


def spread(name: str, values: list[float], form: str = "6.2f") -> str:
    low, middle, high = min(values), median(values), max(values)
    return f"{name:54}{middle:{form}}   {low:{form}} to {high:{form}}"


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 9
    pages = int(sys.argv[2]) if len(sys.argv) > 2 else 8192
    try:
        with tempfile.TemporaryDirectory() as directory, closing(KvmSystem()) as system:
            numba, c = CompiledEngine(system, NUMBA), CompiledEngine(system, in_c(directory))
            timed = CompiledEngine(system, NUMBA, timed=True)

            def run(engine: CompiledEngine, way: Way, vcpus: int, fault: Fault) -> Run:
                return run_once(system, Shape(way, vcpus, pages, fault, readers=vcpus), engine)

            run(numba, Way.EXIT, 1, Fault.MINOR)
            run(numba, Way.UFFD, 1, Fault.MISSING)  # compiled, and the caches warm
            for fault in Fault:
                measure(run, numba, c, timed, fault, rounds)
    except GuestfaultError as error:
        print(f"hot_loop: {error}", file=sys.stderr)
        return 2
    return 0


def measure(
    run: Callable[[CompiledEngine, Way, int, Fault], Run],
    numba: CompiledEngine,
    c: CompiledEngine,
    timed: CompiledEngine,
    fault: Fault,
    rounds: int,
) -> None:
    runs: dict[str, list[Run]] = {}
    for n in range(rounds):
        cells = [
            ("exit 1", numba, Way.EXIT, 1),
            ("uffd 1", numba, Way.UFFD, 1),
            ("C exit 1", c, Way.EXIT, 1),
            ("exit 2", numba, Way.EXIT, 2),
            ("C exit 2", c, Way.EXIT, 2),
            ("uffd 2", numba, Way.UFFD, 2),
            ("C uffd 1", c, Way.UFFD, 1),
            ("timed", timed, Way.EXIT, 1),
        ]
        for name, engine, way, vcpus in cells if n % 2 else reversed(cells):
            runs.setdefault(name, []).append(run(engine, way, vcpus, fault))

    def ratio(above: str, below: str) -> list[float]:
        return [a.rate / b.rate for a, b in zip(runs[above], runs[below], strict=True)]

    elsewhere = [run.elsewhere for each in runs.values() for run in each]
    print(f"\n{fault.value} faults, {rounds} rounds{'':31}median   least to most")
    print(spread("exit over uffd, 1 vCPU (>= 1.8)", ratio("exit 1", "uffd 1")))
    print(spread("exit over uffd, 2 vCPUs", ratio("exit 2", "uffd 2")))
    print(spread("two vCPUs over one, exit (>= 1.8)", ratio("exit 2", "exit 1")))
    print(spread("numba over C, exit, 1 vCPU (>= 0.95)", ratio("exit 1", "C exit 1")))
    print(spread("numba over C, exit, 2 vCPUs (>= 0.95)", ratio("exit 2", "C exit 2")))
    print(spread("numba over C, uffd, 1 vCPU", ratio("uffd 1", "C uffd 1")))
    outside = [(run.outside_ns or 0) / 1e3 for run in runs["timed"]]
    print(spread("us outside the kernel per fault (<= 1)", outside))
    for name, each in runs.items():
        us = [1e6 * run.shape.vcpus / run.rate for run in each]
        print(spread(f"us per fault and vCPU, {name}", us, "6.1f"))
    print(spread("elsewhere, of the machine", elsewhere))


if __name__ == "__main__":
    sys.exit(main())
