"""``guestfault lab``: start a real kernel, and run a command on its ``/dev/kvm``."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from guestfault.cli.arguments import positive_number
from guestfault.errors import GuestfaultError
from guestfault.lab.bochs import Bochs, fetch_bochs, find_bochs
from guestfault.lab.errors import MachineError
from guestfault.lab.frames import Kind
from guestfault.lab.image import open_kernel
from guestfault.lab.kernels import SUITES, add_kernel, fetch_kernel, fetched, find_kernel
from guestfault.lab.machine import MEMORY, MEMORY_WITH_NUMBA, TIMEOUT, Result, run
from guestfault.lab.qemu import Qemu, fetch_qemu, find_qemu
from guestfault.lab.store import storing

__all__ = ["add_arguments", "main"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the commands of the lab and their arguments."""
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_fetch(commands.add_parser("fetch", help="get a Debian kernel, and QEMU if need be"))
    _add_add(commands.add_parser("add", help="keep a kernel that was built, under its release"))
    _add_run(commands.add_parser("run", help="boot a kernel and run a command in it"))
    list_ = commands.add_parser("list", help="the kernels, QEMU and Bochs that are here")
    list_.set_defaults(lab=_list)


def _add_fetch(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "kernels",
        nargs="+",
        metavar="KERNEL",
        help="a version such as 6.12 or 7.3.4 (the newest such one), or a package's name",
    )
    parser.add_argument(
        "--suite",
        action="append",
        metavar="NAME",
        help=f"a Debian suite to look in (default: {', '.join(SUITES)})",
    )
    parser.add_argument(
        "--mirror", metavar="URI", help="of a Debian archive; else the one in the apt sources"
    )
    parser.add_argument(
        "--bochs", action="store_true", help="get Bochs too, if need be: it runs kvm_intel"
    )
    parser.set_defaults(lab=_fetch)


def _add_add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kernel", metavar="PATH", help="a bzImage, or a built kernel tree")
    parser.add_argument("--modules", type=Path, metavar="DIR", help="the kernel's modules")
    parser.set_defaults(lab=_add)


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--kernel",
        required=True,
        metavar="PATH|NAME",
        help="a bzImage, a built kernel tree, or the name of a kernel in `lab list`",
    )
    parser.add_argument("--modules", type=Path, metavar="DIR", help="the kernel's modules")
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--npt",
        choices=("0", "1"),  # no default: argparse lets one pass beside the other option
        help="whether kvm_amd uses nested page tables (default 1) or shadow ones",
    )
    which.add_argument(
        "--ept",
        choices=("0", "1"),
        help="the same of kvm_intel, on a machine with VMX, under Bochs: several times as slow",
    )
    parser.add_argument("--smp", type=positive_number, default=1, metavar="N", help="processors")
    parser.add_argument(
        "--memory",
        type=positive_number,
        metavar="MiB",
        help=f"default {MEMORY}; with numba {MEMORY_WITH_NUMBA}",
    )
    parser.add_argument(
        "--timeout",
        type=_seconds,
        default=TIMEOUT,
        metavar="S",
        help=f"seconds for the command (default {TIMEOUT:g})",
    )
    parser.add_argument(
        "--boot-timeout",
        type=_seconds,
        metavar="S",
        help="seconds for the kernel to boot"
        f" (default {Qemu.boot_timeout:g}; with --ept {Bochs.boot_timeout:g})",
    )
    parser.add_argument(
        "--file",
        action="append",
        default=[],
        type=_pair,
        metavar="INSIDE:HERE",
        help="a file to bring back when the command has ended; may be given again",
    )
    parser.add_argument(
        "--add",
        action="append",
        default=[],
        type=_pair,
        metavar="HERE:INSIDE",
        help="a program, with its libraries, a file or a directory to take along",
    )
    parser.add_argument(
        "--with-numba",
        action="store_true",
        help="take numba along, for the compiled loop (+200 MB)",
    )
    parser.add_argument(
        "--append", action="append", default=[], metavar="TEXT", help="to the kernel command line"
    )
    parser.add_argument(
        "--without-kvm", action="store_true", help="run the command even if there is no /dev/kvm"
    )
    parser.add_argument("command", nargs="+", metavar="COMMAND", help="after --")
    # On this side of the command, --verbose shows the console; see guestfault.cli.main.
    parser.add_argument(
        "--verbose",
        action="store_true",
        default=argparse.SUPPRESS,
        help="show the kernel's console, on standard error",
    )
    parser.set_defaults(lab=_run)


def main(args: argparse.Namespace) -> int:
    """Run the command.  ``lab run``: the exit status is the one of the command inside."""
    status: int = args.lab(args)
    return status


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")
    return seconds


def _pair(text: str) -> tuple[str, str]:
    source, colon, target = text.rpartition(":")
    if not (colon and source and target):
        raise argparse.ArgumentTypeError(f"{text!r} is not two paths with a colon between them")
    return source, target


def _say(text: str) -> None:
    print(f"guestfault: {text}", file=sys.stderr, flush=True)


# -- fetch, add, list ----------------------------------------------------------------------------


def _fetch(args: argparse.Namespace) -> int:
    for name in args.kernels:
        kernel = fetch_kernel(name, mirror=args.mirror, suites=args.suite or SUITES, say=_say)
        print(f"{kernel.release}  {kernel.image}")
    _show_qemu(fetch_qemu(mirror=args.mirror, say=_say))
    if args.bochs:
        _show_bochs(fetch_bochs(mirror=args.mirror, say=_say))
    return 0


def _add(args: argparse.Namespace) -> int:
    kernel = add_kernel(open_kernel(Path(args.kernel), args.modules))
    print(f"{kernel.release}  {kernel.image}")
    return 0


def _list(_args: argparse.Namespace) -> int:
    for kernel in fetched():
        print(f"{kernel.release}  {kernel.image}")
    try:
        _show_qemu(find_qemu())
    except GuestfaultError as error:
        print(error)
    try:
        _show_bochs(find_bochs())
    except GuestfaultError as error:
        print(error)
    return 0


def _show_bochs(bochs: Bochs) -> None:
    print(f"Bochs {'.'.join(map(str, bochs.version))}  {bochs.program}")


def _show_qemu(qemu: Qemu) -> None:
    version = ".".join(map(str, qemu.version))
    print(f"QEMU {version}  {qemu.program}")
    if not qemu.good:
        _say(f"QEMU {version} is older than 10: the lab leaves an instruction out of its processor")


# -- run -----------------------------------------------------------------------------------------


def _run(args: argparse.Namespace) -> int:
    try:
        result = run(
            find_kernel(args.kernel, args.modules),
            args.command,
            npt=args.npt != "0",
            ept=None if args.ept is None else args.ept == "1",
            processors=args.smp,
            memory=args.memory,
            timeout=args.timeout,
            boot_timeout=args.boot_timeout,
            files=[inside for inside, _ in args.file],
            added={inside: Path(here) for here, inside in args.add},
            arguments=args.append,
            needs_kvm=not args.without_kvm,
            numba=args.with_numba,
            verbose=args.verbose,
            on_output=_pass_on,
            on_console=_show_console if args.verbose else None,
        )
    except MachineError as error:
        if not args.verbose:
            _show_trouble(error)
        raise
    for warning in result.warnings:
        _say(f"the kernel warned: {warning}")
    _keep(result, args.file)
    if args.verbose:
        _say(f"booted in {result.boot_seconds:.1f} s, {result.seconds:.1f} s in all")
    return result.status


def _pass_on(kind: Kind, data: bytes) -> None:
    stream = sys.stdout if kind is Kind.STDOUT else sys.stderr
    stream.buffer.write(data)
    stream.buffer.flush()


def _show_console(data: bytes) -> None:
    sys.stderr.buffer.write(data.replace(b"\r", b""))
    sys.stderr.buffer.flush()


_CONSOLE_LINES = 60


def _show_trouble(error: MachineError) -> None:
    """What the kernel said of it: without messages below a warning that is all that matters."""
    lines = error.console.decode("utf-8", "replace").replace("\r", "").splitlines()
    for line in lines[-_CONSOLE_LINES:]:
        print(f"  | {line}", file=sys.stderr)


def _keep(result: Result, wanted: list[tuple[str, str]]) -> None:
    """Write the files that were brought back; where one is missing, success is none."""
    for inside, here in wanted:
        if (data := result.files.get(inside)) is not None:
            with storing(here):
                Path(here).write_bytes(data)
    for inside, why in result.missing.items():
        _say(f"{inside} cannot be brought back: {why}")
    if result.missing and result.status == 0:
        result.status = 2
