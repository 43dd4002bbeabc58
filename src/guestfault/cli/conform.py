"""``guestfault conform``: ask KVMs, real and software, what they do, and compare.

Exit status 0 when the cases ran: what a KVM does is a result, not an error.  With ``--against``, 1
if anything differs; with ``--differential``, 1 if anything differs that has no explanation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from guestfault.cli.arguments import positive_number
from guestfault.cli.transient import transient
from guestfault.conform.case import Case, matching
from guestfault.conform.compare import against
from guestfault.conform.differential import disagreements, matching_soft
from guestfault.conform.document import Column, Document, DocumentError, Outcomes, load, save
from guestfault.conform.page import put_into_page
from guestfault.conform.run import run_cases
from guestfault.conform.target import Target, about, open_system, parse
from guestfault.conform.text import (
    as_details,
    as_differences,
    as_disagreements,
    as_markdown,
    as_table,
)
from guestfault.errors import GuestfaultError, Unavailable
from guestfault.lab.frames import Kind
from guestfault.lab.kernels import find_kernel
from guestfault.lab.machine import run as run_in_lab

__all__ = ["add_arguments", "main"]

_DEFAULT = ("soft:linux-7.3", "soft:linux-7.3,npt=0")
_LAB_TIMEOUT = 1800.0
_INSIDE = "progress: "


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``guestfault conform``."""
    parser.add_argument(
        "cases", nargs="*", metavar="CASE", help="a case, or a pattern such as 'missing/*/cpl3'"
    )
    parser.add_argument(
        "--on",
        action="append",
        metavar="KVM",
        help="soft[:DIALECT][,npt=0], kvm, or lab:KERNEL[,npt=0|,ept=1|,ept=0]; again for several"
        f" (default: {' '.join(_DEFAULT)}, and kvm if it is usable)",
    )
    parser.add_argument(
        "--case", action="append", default=[], metavar="PATTERN", help="the same as CASE"
    )
    parser.add_argument("--list", action="store_true", help="list the cases")
    parser.add_argument("--json", action="store_true", help="print everything that was recorded")
    parser.add_argument(
        "--into",
        metavar="FILE",
        help="put what was recorded into a table of --json, and go on with that",
    )
    parser.add_argument(
        "--page", metavar="FILE", help="put the table, as Markdown, where it is in a page of docs"
    )
    parser.add_argument(
        "--differing", action="store_true", help="leave out the rows that are the same throughout"
    )
    parser.add_argument(
        "--from", dest="file", metavar="FILE", help="show a table of --json; run nothing"
    )
    parser.add_argument(
        "--against", metavar="FILE", help="what differs from a table of --json; status 1 if any"
    )
    parser.add_argument(
        "--differential",
        action="store_true",
        help="hold each real KVM against the software one that claims to be like it",
    )
    parser.add_argument(
        "--repeat", type=positive_number, default=1, metavar="N", help="run each case N times"
    )
    parser.add_argument(
        "--hostile",
        action="store_true",
        help="run the cases too that damage this machine until it boots again (a lab always does)",
    )
    parser.add_argument(
        "--details", action="store_true", help="show all that was recorded, case by case"
    )
    parser.add_argument("--tell-progress", action="store_true", help=argparse.SUPPRESS)


def main(args: argparse.Namespace) -> int:
    """Do what the options say."""
    patterns = [*args.cases, *args.case]
    cases = matching(patterns)
    if args.list:
        _list(cases)
        return 0
    before = load(args.against) if args.against else None
    if args.file:
        document = _chosen(load(args.file), cases if patterns else None)
    else:
        document = _run(args, cases)
    if args.into:
        document = _into(args.into, document)
    if before is not None:
        return _against(before, document)
    if args.differential:
        return _differential(document, cases, args)
    if args.json:
        print(document.to_json())
    elif args.page:
        put_into_page(args.page, as_markdown(document))
    elif args.details:
        print(as_details(document), end="")
    else:
        print(as_table(document, differing=args.differing), end="")
    return 0


def _list(cases: Sequence[Case]) -> None:
    width = max(len(case.name) for case in cases)
    for case in cases:
        print(f"{case.name:{width}}  {case.title}")


def _into(path: str, document: Document) -> Document:
    """The table that is kept there, with these results."""
    kept = load(path) if Path(path).exists() else Document()
    kept.take_in(document)
    known = [case.name for case in matching([])]
    for column in kept.columns:
        column.cases = {name: column.cases[name] for name in known if name in column.cases}
    save(kept, path)
    return kept


def _chosen(document: Document, cases: Sequence[Case] | None) -> Document:
    if cases is not None:
        wanted = {case.name for case in cases}
        for column in document.columns:
            column.cases = {n: found for n, found in column.cases.items() if n in wanted}
    return document


def _against(before: Document, after: Document) -> int:
    pairs = against(before, after)
    if not pairs:
        names = ", ".join(column.name for column in before.columns)
        raise GuestfaultError(f"no KVM is in both tables; the file has {names}")
    for old, new, found in pairs:
        print(as_differences(old, new, found), end="")
    return int(any(found for _, _, found in pairs))


# -- running -------------------------------------------------------------------------------------


def _run(args: argparse.Namespace, cases: Sequence[Case]) -> Document:
    targets = [parse(text) for text in args.on] if args.on else _default_targets()
    progress = _Progress(args.tell_progress)
    try:
        columns = [_column(target, cases, args, progress) for target in targets]
    finally:
        progress.clear()
    return Document(columns)


def _default_targets() -> list[Target]:
    targets = [parse(text) for text in _DEFAULT]
    kvm = Target("kvm")
    try:
        open_system(kvm).close()
    except Unavailable:
        return targets
    return [*targets, kvm]


def _column(
    target: Target, cases: Sequence[Case], args: argparse.Namespace, progress: _Progress
) -> Column:
    progress.begin(target.name, len(cases))
    if target.kind == "lab":
        return _in_lab(target, cases, args, progress)
    system = open_system(target)
    try:
        found = run_cases(
            system, cases, hostile=args.hostile, repeat=args.repeat, progress=progress.step
        )
    finally:
        system.close()
    outcomes = {name: Outcomes.of(results) for name, results in found.items()}
    return Column(target.name, about(target), outcomes)


def _in_lab(
    target: Target, cases: Sequence[Case], args: argparse.Namespace, progress: _Progress
) -> Column:
    """Run this command in the lab, and take over what it prints."""
    command = ["guestfault", "conform", "--on", "kvm", "--json", "--hostile", "--tell-progress"]
    command += ["--repeat", str(args.repeat), *(case.name for case in _named(cases))]

    def told(kind: Kind, data: bytes) -> None:
        if kind is Kind.STDERR:
            progress.told(data)

    result = run_in_lab(
        find_kernel(target.which),
        command,
        npt=target.npt,
        ept=target.npt if target.intel else None,
        timeout=_LAB_TIMEOUT * args.repeat,
        on_output=told,
    )
    if result.status:
        said = [
            line
            for line in result.stderr.decode("utf-8", "replace").splitlines()
            if not line.startswith(_INSIDE)
        ]
        why = said[-1] if said else "it says nothing"
        raise GuestfaultError(f"{target.name}: conform ended with {result.status} there: {why}")
    document = Document.from_json(result.stdout.decode("utf-8", "replace"), target.name)
    if len(document.columns) != 1:
        raise DocumentError(target.name, "it ran something else than one KVM")
    column = document.columns[0]
    column.name = target.name
    if result.warnings:
        column.about["warnings"] = "; ".join(result.warnings)
    return column


def _named(cases: Sequence[Case]) -> Sequence[Case]:
    """The cases to name on a command line: none if they are all."""
    return [] if len(cases) == len(matching([])) else cases


class _Progress:
    """One line on standard error, written over, if a person watches; lines if we are told to."""

    def __init__(self, tell: bool) -> None:
        self._tell = tell
        self._name, self._done, self._total = "", 0, 0

    def begin(self, name: str, total: int) -> None:
        """A KVM's cases begin."""
        self._name, self._done, self._total = name, 0, total
        self._show("")

    def step(self, case: Case) -> None:
        """A case begins."""
        self._done += 1
        if self._tell:
            print(f"{_INSIDE}{self._done} {case.name}", file=sys.stderr, flush=True)
        self._show(case.name)

    def told(self, data: bytes) -> None:
        """What one of us says who runs in the lab."""
        for line in data.decode("utf-8", "replace").splitlines():
            number, _, name = line.removeprefix(_INSIDE).partition(" ")
            if line.startswith(_INSIDE) and number.isdecimal():
                self._done = int(number)
                self._show(name)

    def _show(self, what: str) -> None:
        if not self._tell:
            transient(f"{self._name}: {self._done} of {self._total}; {what}")

    def clear(self) -> None:
        """Leave nothing of it."""
        if not self._tell:
            transient("")


# -- the differential ----------------------------------------------------------------------------


def _differential(document: Document, cases: Sequence[Case], args: argparse.Namespace) -> int:
    open_cases = 0
    progress = _Progress(tell=False)
    for real in document.columns:
        if real.name.startswith("soft"):
            continue
        soft = matching_soft(real.about)
        if soft is None:
            print(f"{real.name}: no dialect of the software KVM claims to be like it")
            continue
        known = [column for column in document.columns if column.name == soft.name]
        column = known[0] if known else _column(soft, cases, args, progress)
        progress.clear()
        found = disagreements(column, real)
        print(as_disagreements(column, real, found), end="")
        open_cases += sum(bool(d.open_fields) for d in found)
    return int(open_cases > 0)
