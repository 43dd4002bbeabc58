#!/usr/bin/env python3
"""Runs this package's tests on the KVM of a kernel in the lab.

Tests that need nested paging, private memory or a kernel of some version are skipped on most
machines' own /dev/kvm.  Here is one that has them::

    .venv/bin/python scripts/lab-tests.py 7.3.4-sw-protected
    .venv/bin/python scripts/lab-tests.py --npt 0 6.12 -q tests/kvm

The kernel is what ``guestfault lab run --kernel`` takes; what follows are pytest's arguments,
and unless they name tests, those that speak to a KVM are run.  The exit status is pytest's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import sys
from pathlib import Path

from guestfault.errors import GuestfaultError
from guestfault.lab.frames import Kind
from guestfault.lab.kernels import find_kernel
from guestfault.lab.layers import DEPENDENCIES
from guestfault.lab.machine import run

REPOSITORY = Path(__file__).resolve().parent.parent
DIRECTORIES = ("tests", "docs", "benchmarks", "pyproject.toml", "README.md")
PROGRAMS = ("sh", "mount", "umount", "unshare")
PLUGINS = ("pytest_timeout", "_hypothesis_pytestplugin")
PACKAGES = (
    *("pytest", "pluggy", "iniconfig", "packaging", "pygments", "pytest-timeout"),
    *("hypothesis", "sortedcontainers"),
)
# What QEMU's processor is to blame for: it begins an instruction that reads and writes with a read.
NOT_THERE = (
    "tests/fault/locate/test_tracepoint.py::test_every_kind_of_access_to_a_protected_page",
    "tests/fault/locate/test_accuracy.py::test_never_wrong_and_never_missed",
)
TESTS = ("tests/kvm", "tests/fault")


def main() -> int:
    """Do it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kernel", metavar="KERNEL")
    parser.add_argument("--npt", choices=("0", "1"), default="1")
    parser.add_argument("--smp", type=int, default=1, metavar="N")
    args, arguments = parser.parse_known_args()
    named = any(argument.startswith("tests") for argument in arguments)
    added = {f"/root/{name}": REPOSITORY / name for name in DIRECTORIES}
    for program in PROGRAMS:
        if path := shutil.which(program):
            added[f"/usr/bin/{program}"] = Path(path)
    for package in PACKAGES:
        for file in importlib.metadata.files(package) or ():
            found = Path(str(file.locate()))
            if found.suffix != ".pyc" and ".." not in file.parts and found.is_file():
                added[f"{DEPENDENCIES}/{file}"] = found
    command = ["python3", "-m", "pytest", "-p", "no:cacheprovider"]
    command += [f"--deselect={test}" for test in NOT_THERE]
    for plugin in PLUGINS:
        command += ["-p", plugin]
    result = run(
        find_kernel(args.kernel),
        [*command, *arguments, *([] if named else TESTS)],
        npt=args.npt == "1",
        processors=args.smp,
        memory=1024,
        timeout=1800,
        added=added,
        environment={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        on_output=_pass_on,
    )
    for warning in result.warnings:
        print(f"the kernel warned: {warning}", file=sys.stderr)
    return result.status


def _pass_on(kind: Kind, data: bytes) -> None:
    stream = sys.stdout if kind is Kind.STDOUT else sys.stderr
    stream.buffer.write(data)
    stream.buffer.flush()


if __name__ == "__main__":
    try:
        sys.exit(main())
    except GuestfaultError as error:
        sys.exit(f"lab-tests.py: {error}")
