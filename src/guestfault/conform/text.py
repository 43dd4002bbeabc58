"""Tables and details for people."""

from __future__ import annotations

import json
from collections.abc import Iterable

from guestfault.conform.case import CASES
from guestfault.conform.compare import CaseDifference
from guestfault.conform.differential import Disagreement
from guestfault.conform.document import Column, Document, Outcomes
from guestfault.conform.record import Exit, Result

__all__ = ["LEGEND", "as_details", "as_differences", "as_disagreements", "as_markdown", "as_table"]

LEGEND = """\
completes  the access succeeds          zeros     it does, on other data than was there
bare       -EFAULT, and no more         blocks    KVM_RUN sleeps until somebody acts
annotated  -EFAULT and a description    loops     KVM_RUN comes back only when it is kicked
MMIO       0 and KVM_EXIT_MMIO          internal  KVM_EXIT_INTERNAL_ERROR
#PF, #UD   the guest gets an exception  shutdown  KVM_EXIT_SHUTDOWN, a triple fault
interrupted  -EINTR, and a SIGBUS       hangs     nothing ends the call but the process's end
maps part  KVM_PRE_FAULT_MEMORY's       skipped   the reasons are below
A row begins with ! where the cells differ, with ~ where only the details behind them do."""

_MODES = ("cpl3", "cpl0", "real")


def as_table(document: Document, *, differing: bool = False) -> str:
    """Cases down, KVMs across.  Modes that all KVMs treat alike share a row."""
    rows = _rows(document, differing)
    names = [column.name for column in document.columns]
    widths = [max(len(row[1][i]) for row in [("", names), *rows]) for i in range(len(names))]
    first = max([len(label) for label, _ in rows], default=0)
    lines = [" " * first + "  " + _line(names, widths)]
    lines += [f"{label:{first}}  {_line(cells, widths)}" for label, cells in rows]
    return "\n".join([*lines, "", LEGEND, *_skips(document), *_flaps(document)]) + "\n"


def as_markdown(document: Document) -> str:
    """The same as a table of Markdown; accesses that all KVMs treat alike share a row too."""
    groups: dict[tuple[str, str, str, tuple[str, ...]], list[str]] = {}
    for label, cells in _rows(document, False):
        mark, name = label[:1], label[2:]
        condition, access, modes = f"{name}//".split("/")[:3]
        groups.setdefault((mark, condition, modes, tuple(cells)), []).append(access)
    names = [column.name for column in document.columns]
    lines = ["|  | x is | access | mode | " + " | ".join(names) + " |"]
    lines.append("|---" * (len(names) + 4) + "|")
    for (mark, condition, modes, shared), accesses in groups.items():
        shown = [f"**{cell}**" if mark == "!" else cell for cell in shared]
        head = [mark.strip(), condition, ", ".join(accesses), modes.replace(",", ", ")]
        lines.append("| " + " | ".join([*head, *shown]) + " |")
    return "\n".join(lines) + "\n"


def _line(cells: Iterable[str], widths: list[int]) -> str:
    return "  ".join(f"{c:{w}}" for c, w in zip(cells, widths, strict=True)).rstrip()


def _rows(document: Document, differing: bool) -> list[tuple[str, list[str]]]:
    """Labels with their mark, and cells; runs of modes with the same row are joined."""
    groups: dict[str, list[tuple[str, str, list[str]]]] = {}
    for name in document.case_names:
        found = [column.cases.get(name) for column in document.columns]
        mark = _mark(found)
        if differing and mark == " ":
            continue
        cells = ["" if outcomes is None else outcomes.word for outcomes in found]
        stem, _, mode = name.rpartition("/")
        if mode not in _MODES:
            stem, mode = name, ""
        groups.setdefault(stem, []).append((mark, mode, cells))
    rows = []
    for stem, members in groups.items():
        kinds: dict[tuple[str, tuple[str, ...]], list[str]] = {}
        for mark, mode, cells in members:
            kinds.setdefault((mark, tuple(cells)), []).append(mode)
        for (mark, shared), modes in kinds.items():
            suffix = f"/{','.join(modes)}" if modes != [""] else ""
            rows.append((f"{mark} {stem}{suffix}", list(shared)))
    return rows


def _mark(found: list[Outcomes | None]) -> str:
    ran = [outcomes for outcomes in found if outcomes is not None and not outcomes.skipped]
    if len({outcomes.word for outcomes in ran}) > 1:
        return "!"
    return "~" if any(outcomes.results[0][1] != ran[0].first for outcomes in ran) else " "


def _skips(document: Document) -> list[str]:
    """Why cases were skipped, or failed: for each reason, which cases and on which KVMs."""
    on: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for column in document.columns:
        whys: dict[str, list[str]] = {}
        for name, outcomes in column.cases.items():
            if outcomes.first.why:
                whys.setdefault(f"{outcomes.word}: {outcomes.first.why}", []).append(name)
        for why, names in whys.items():
            on.setdefault((why, tuple(names)), []).append(column.name)
    lines = []
    for (why, cases), columns in on.items():
        kinds = ", ".join(dict.fromkeys(map(_kind, cases)))
        lines += [f"{len(cases)} {why} ({kinds})", f"    on {' '.join(columns)}"]
    return ["", *lines] if lines else []


def _kind(name: str) -> str:
    condition, _, rest = name.partition("/")
    return rest if rest == "prefault" else condition


def _flaps(document: Document) -> list[str]:
    lines = [
        f"{column.name}, {name}: not the same each time: {outcomes.word}, "
        + ", ".join(f"{count} times" for count, _ in outcomes.results)
        for column in document.columns
        for name, outcomes in column.cases.items()
        if outcomes.flaps
    ]
    return ["", *lines] if lines else []


def as_details(document: Document) -> str:
    """Everything that was recorded, case by case and KVM by KVM."""
    lines = []
    for name in document.case_names:
        title = CASES[name].title if name in CASES else ""
        lines += [f"{name}: {title}", ""]
        for column in document.columns:
            if (outcomes := column.cases.get(name)) is None:
                continue
            for count, result in outcomes.results:
                times = f" ({count} times)" if outcomes.flaps else ""
                lines += [f"  {column.name}{times}: {result.word}", *_detail(result), ""]
    return "\n".join(lines)


def _detail(result: Result) -> list[str]:
    lines = [f"    {result.why}"] if result.why else []
    for phase in result.phases:
        for exit_ in phase.exits:
            lines.append(f"    {phase.name:8} {_exit(exit_)}")
            lines += [f"    {'':8}   union at {at}: {bytes_}" for at, bytes_ in exit_.union]
        if phase.blocked is not None:
            lines.append(f"    {phase.name:8} sleeps: {json.dumps(phase.blocked)}")
    if result.ending:
        value = f", the guest reports {result.value}" if result.value else ""
        memory = f", memory holds {result.memory}" if result.memory else ""
        lines.append(f"    ends {result.ending}{value}{memory}")
    if result.signals:
        lines.append(f"    signals: {', '.join(result.signals)}")
    return lines


def _exit(exit_: Exit) -> str:
    ret = f"-{exit_.errno}" if exit_.ret else "0"
    reason = "not written" if exit_.exit_reason is None else str(exit_.exit_reason)
    payload = " ".join(f"{key}={value}" for key, value in exit_.payload.items())
    at = f", RIP at {exit_.rip}" if exit_.rip else ""
    return f"{exit_.word}: KVM_RUN = {ret}, exit_reason {reason}{at} {payload}".rstrip()


def as_differences(old: Column, new: Column, found: list[CaseDifference]) -> str:
    """What two KVMs do not agree on, the fields of each case below it."""
    lines = [f"{old.name} -> {new.name}: {len(found)} of {len(new.cases)} cases differ"]
    for case in found:
        lines.append(f"{case.case}: {_arrow(case.left.word, case.right.word)}")
        for field in case.fields:
            if field.path != "word":
                lines.append(f"    {field.path}: {_arrow(field.left, field.right)}")
    return "\n".join(lines) + "\n"


def _arrow(left: object, right: object) -> str:
    return f"{left}" if left == right else f"{left} -> {right}"


def as_disagreements(soft: Column, real: Column, found: list[Disagreement]) -> str:
    """How a real KVM and the software one agree, why not, and where nobody knows why."""
    ran = [
        name
        for name, outcomes in real.cases.items()
        if not outcomes.skipped and name in soft.cases and not soft.cases[name].skipped
    ]
    unexplained = [d for d in found if d.open_fields]
    lines = [
        f"{real.name} and {soft.name}: {len(ran)} cases run by both, {len(ran) - len(found)} alike,"
        f" {len(found) - len(unexplained)} explained, {len(unexplained)} not"
    ]
    for reason in dict.fromkeys(e for d in found for e in d.explained):
        count = sum(reason in d.explained for d in found)
        lines.append(f"  {reason.name} ({count}): {reason.why}")
    for disagreement in unexplained:
        case = disagreement.difference
        lines.append(f"! {case.case}: {soft.name} {case.left.word}, {real.name} {case.right.word}")
        lines += [
            f"    {field.path}: {field.left}, {field.right}"
            for field in case.fields
            if field.path in disagreement.open_fields
        ]
    return "\n".join(lines) + "\n"
