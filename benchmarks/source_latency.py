"""What a slow source does to the two modes: ``python benchmarks/source_latency.py [ROUNDS]``.

``guestfault run`` on this machine's ``/dev/kvm``, from a real nbdkit on a local socket that answers
each request so many milliseconds late; one page per fault.  In exit mode every vCPU's thread reads
for itself, so vCPUs wait at the same time; in uffd mode the handler's one thread reads for all.

Each figure is the median over the rounds of the run's seconds, and of the ratio within a round.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median
from typing import Any

_MIB = 16
_DELAYS = (0, 1, 10)  # ms, the least that nbdkit's filter knows
_VCPUS = (1, 2, 4)
_GUESTFAULT = [str(Path(sys.executable).with_name("guestfault")), "run", "--kvm", "kvm", "--json"]


def main() -> int:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"{_MIB} MiB, {rounds} rounds; seconds\n")
    print(f"{'late by':>10}{'vCPUs':>7}{'exit':>8}{'uffd':>8}   uffd over exit, least to most")
    with tempfile.TemporaryDirectory() as directory:
        for vcpus in _VCPUS:
            snapshot = Path(directory, f"snapshot-{vcpus}")
            made = ["--memory", f"{_MIB}M", "--vcpus", str(vcpus), "--save", str(snapshot)]
            run([*_GUESTFAULT, *made])
            for delay in _DELAYS:
                with served(snapshot / "memory", Path(directory, "socket"), delay) as source:
                    show(snapshot, source, vcpus, delay, rounds)
    return 0


def show(snapshot: Path, source: str, vcpus: int, delay: int, rounds: int) -> None:
    seconds: dict[str, list[float]] = {"exit": [], "uffd": []}
    for n in range(rounds):
        for mode in sorted(seconds, reverse=bool(n % 2)):
            options = ["--mode", mode, "--fault-around", "off", "--memory-from", source]
            seconds[mode].append(run([*_GUESTFAULT, str(snapshot), *options])["seconds"])
    ratios = [u / e for e, u in zip(seconds["exit"], seconds["uffd"], strict=True)]
    middle = {mode: median(each) for mode, each in seconds.items()}
    print(
        f"{delay:7} ms{vcpus:7}{middle['exit']:8.2f}{middle['uffd']:8.2f}"
        f"   {median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}",
        flush=True,
    )


def run(command: list[str]) -> Any:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"source_latency: {done.stderr.strip()}")
    return json.loads(done.stdout)


@contextmanager
def served(memory: Path, socket: Path, delay: int) -> Iterator[str]:
    """nbdkit on a socket, for as long as the block lasts; the source's URL."""
    late = ["--filter=delay"] if delay else []
    server = subprocess.Popen(
        ["nbdkit", "-r", "-f", "-U", str(socket), *late, "file", str(memory)]
        + ([f"rdelay={delay}ms"] if delay else [])
    )
    try:
        while not socket.exists():
            if server.poll() is not None:
                sys.exit("source_latency: nbdkit does not start")
            time.sleep(0.05)
        yield f"nbd+unix:///?socket={socket}"
    finally:
        server.terminate()
        server.wait()
        socket.unlink(missing_ok=True)


if __name__ == "__main__":
    sys.exit(main())
