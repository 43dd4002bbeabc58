"""The ``guestfault`` command: finds the command asked for, runs it, and reports its errors.

A command is one line of :data:`COMMANDS` and one module, which offers two functions::

    def add_arguments(parser: argparse.ArgumentParser) -> None: ...
    def main(args: argparse.Namespace) -> int: ...  # the exit status

Only the module of the command in use is imported, so ``guestfault --help`` loads none, and
neither a command's imports nor a fault in them cost another command anything.

Exit status: what the command's ``main`` returns; 2 for a wrong command line and for every
:class:`~guestfault.errors.GuestfaultError`, with one line on standard error; 130 after Ctrl-C; and
141 if the reader of standard output went away, as if SIGPIPE had ended the process.  Any other
exception is a defect of guestfault and shows its traceback; ``--verbose`` shows it for all of them.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

import guestfault
from guestfault.errors import GuestfaultError

__all__ = ["COMMANDS", "Command", "main"]

EXIT_ERROR = 2
EXIT_INTERRUPTED = 128 + 2  # SIGINT
EXIT_BROKEN_PIPE = 128 + 13  # SIGPIPE


class Command(NamedTuple):
    """A command's name, its line in ``guestfault --help``, and the module that has it."""

    name: str
    help: str
    module: str


# In the order of --help.  A new command is a line here and its module.
COMMANDS: tuple[Command, ...] = (
    Command(
        "run",
        "start a guest with none of its memory present, and bring it in",
        "guestfault.cli.run",
    ),
    Command(
        "snapshot",
        "make one compressed file of a snapshot, and a directory again",
        "guestfault.cli.snapshot",
    ),
    Command("check", "what this machine offers, and how to mend the rest", "guestfault.cli.check"),
    Command(
        "explain",
        "the access behind a failure, from the register dump in a log",
        "guestfault.cli.explain",
    ),
    Command(
        "dialects",
        "every published version of the memory-fault interface",
        "guestfault.cli.dialects",
    ),
    Command(
        "explore",
        "every order of events in the kernel half, and what each interface makes of it",
        "guestfault.cli.explore",
    ),
    Command(
        "conform",
        "what each KVM does in each case, real kernels and the software KVM",
        "guestfault.cli.conform",
    ),
    Command("bench", "what demand paging costs here, both ways", "guestfault.cli.bench"),
    Command("lab", "run a command on the /dev/kvm of a real kernel", "guestfault.cli.lab"),
)


class _Parser(argparse.ArgumentParser):
    """Reports a wrong command line in one line and a hint, not with the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"{self.prog}: {message}\nTry '{self.prog} --help'.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return its exit status.

    Raises :class:`SystemExit` for ``--help``, ``--version`` and a wrong command line, as argparse
    does.
    """
    words = sys.argv[1:] if argv is None else list(argv)
    verbose = "--verbose" in words  # known before the parser, whose making can fail too
    try:
        args = _parser(words).parse_args(words)
        status: int = args.main(args)
        sys.stdout.flush()  # here, where a broken pipe is still ours to catch
    except GuestfaultError as error:
        _traceback_if(verbose)
        print(f"guestfault: {error}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        _traceback_if(verbose)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        _traceback_if(verbose)
        # The interpreter flushes standard output once more on its way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_BROKEN_PIPE
    return status


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser for this command line, with the options of the command that it names."""
    parser = _Parser(
        prog="guestfault",
        description="When KVM_RUN fails on a guest access: which access it was, why, and its mend.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=_version())
    _add_verbose(parser, default=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    # No option before the command takes a value: the first other word is the command.
    chosen = next((word for word in words if not word.startswith("-")), None)
    for command in COMMANDS:
        subparser = commands.add_parser(
            command.name, help=command.help, description=command.help, allow_abbrev=False
        )
        # No default: it would overwrite what was said before the command.
        _add_verbose(subparser, default=argparse.SUPPRESS)
        if command.name == chosen:
            module = import_module(command.module)
            module.add_arguments(subparser)
            subparser.set_defaults(main=module.main)
    return parser


def _add_verbose(parser: argparse.ArgumentParser, default: object) -> None:
    parser.add_argument(
        "--verbose", action="store_true", default=default, help="show an error's traceback"
    )


def _version() -> str:
    return f"guestfault {guestfault.__version__}"


def _traceback_if(verbose: bool) -> None:
    if verbose:
        import traceback

        traceback.print_exc()
