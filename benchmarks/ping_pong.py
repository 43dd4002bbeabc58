"""No lost wake-up: ``python benchmarks/ping_pong.py [RUNS [VCPUS]]``, by default 10,000 and 8.

On the software KVM, both ways; see :mod:`guestfault.bench.ping_pong`.
"""

from __future__ import annotations

import sys
import time
from contextlib import closing

from guestfault.bench.ping_pong import ping_pong
from guestfault.bench.shape import Way
from guestfault.errors import GuestfaultError
from guestfault.softkvm.system import SoftSystem


def main() -> int:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    vcpus = int(sys.argv[2]) if len(sys.argv) > 2 else 8
    for way in Way:
        with closing(SoftSystem("seed")) as system:
            began = time.monotonic()
            try:
                faults = ping_pong(system, system.dialect.interface, way, vcpus, runs)
            except GuestfaultError as error:
                print(f"{way.value}: {error}")
                return 1
            seconds = time.monotonic() - began
            print(
                f"{way.value}: {runs} runs, {vcpus} vCPUs, {faults} faults, {seconds:.1f} s:"
                " all woken"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
