"""How much memory restoring a guest takes at most, beyond the guest's own.

Run it from the repository; it needs about three times SIZE on the disk::

    .venv/bin/python benchmarks/peak_memory.py [--memory SIZE]

A guest is made and saved, plain and packed, and `guestfault run` brings all of it in: on each KVM
there is, in both modes, in a process of its own.  Its memory is looked at ten times a second in
``/proc/PID/smaps_rollup`` and the most is printed.  What counts is Pss: the guest's RAM is one
memfd that is mapped twice, once to fill pages and once for the guest, and Rss (with it ``VmHWM``)
counts every page of it twice.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from guestfault.cli.arguments import size_of
from guestfault.errors import Unavailable
from guestfault.vmm.choice import choose

MIB = 1 << 20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--memory", default="1G", metavar="SIZE", help="default 1G")
    memory = parser.parse_args().memory
    guest = size_of("--memory", memory)
    kvms = ["soft", "kvm"] if real_kvm() else ["soft"]
    print(f"most memory of a restore of {guest // MIB} MiB, in MiB; beside it what it is more")
    with tempfile.TemporaryDirectory(prefix="guestfault-") as scratch:
        plain, packed = Path(scratch) / "guest", Path(scratch) / "guest.gfs"
        guestfault("run", "--kvm", kvms[-1], "--memory", memory, "--save", str(plain))
        guestfault("snapshot", "pack", str(plain), str(packed))
        for source in (plain, packed):
            for kvm in kvms:
                for mode in ("exit", "uffd"):
                    most = guestfault("run", "--kvm", kvm, "--mode", mode, str(source))
                    name = "plain" if source is plain else "packed"
                    print(f"{name:7}{kvm:5}{mode:5}{most:8.0f}{most - guest / MIB:+8.0f}")


def real_kvm() -> bool:
    """Whether /dev/kvm is usable."""
    try:
        choose("kvm", None).system.close()
    except Unavailable as error:
        print(f"without /dev/kvm: {error}")
        return False
    return True


def guestfault(*arguments: str) -> float:
    """Run the command; the most Pss of its process, in MiB."""
    command = [str(Path(sys.executable).with_name("guestfault")), *arguments]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        most = 0
        while process.poll() is None:
            most = max(most, pss(process.pid))
            time.sleep(0.1)
        if process.returncode:
            sys.exit(f"guestfault {' '.join(arguments)} ended with status {process.returncode}")
    return most / 1024


def pss(pid: int) -> int:
    """The process's proportional share, in KiB; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)


if __name__ == "__main__":
    main()
