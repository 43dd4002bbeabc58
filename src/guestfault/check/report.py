"""The survey for people, as a table of at most the terminal's width, and for programs, as JSON."""

from __future__ import annotations

import json
import textwrap
from collections.abc import Iterator
from typing import Any

from guestfault.check.finding import Finding, Status, Use
from guestfault.check.survey import Survey

__all__ = ["as_json", "as_table"]

# Bumped when a field of the JSON changes its meaning or goes away; new fields may come at any time.
SCHEMA = 1

_COLOURS = {Status.OK: "32", Status.LIMITED: "33", Status.MISSING: "31"}
_STATUS_WIDTH = max(map(len, Status))


def as_json(survey: Survey) -> str:
    """The survey as one JSON object; ``docs/check.md`` describes its fields."""
    document: dict[str, Any] = {
        "schema": SCHEMA,
        "guestfault": survey.version,
        "kernel": survey.kernel,
        "machine": survey.machine,
        "uid": survey.uid,
        "ready": survey.ready,
        "subjects": [
            {"title": subject.title, "findings": [_fields(f) for f in subject.findings]}
            for subject in survey.subjects
        ],
    }
    return json.dumps(document, indent=2)


def _fields(finding: Finding) -> dict[str, Any]:
    return {
        "name": finding.name,
        "status": finding.status,
        "detail": finding.detail,
        "mend": finding.mend,
        "needed_for": finding.needed_for,
    }


def as_table(survey: Survey, width: int = 80, colour: bool = False) -> str:
    """The survey as text: a block per subject, and what this machine is ready for.

    ``width`` is in columns, ``colour`` asks for ANSI colours.
    """
    return "\n".join(_lines(survey, max(width, 40), colour)) + "\n"


def _lines(survey: Survey, width: int, colour: bool) -> Iterator[str]:
    yield (
        f"guestfault {survey.version}, Linux {survey.kernel}, {survey.machine}, uid {survey.uid}"
    )
    for subject in survey.subjects:
        yield ""
        yield subject.title
        name_width = max(len(finding.name) for finding in subject.findings)
        for finding in subject.findings:
            yield from _finding_lines(finding, name_width, width, colour)
    yield ""
    yield "This machine is ready for"
    name_width = max(map(len, Use))
    for use, status in survey.ready.items():
        lacks = ", ".join(
            f.name for f in survey.findings if use in f.needed_for and f.status != "ok"
        )
        finding = Finding(use, status, f"see {lacks}" if lacks else "")
        yield from _finding_lines(finding, name_width, width, colour)


def _finding_lines(finding: Finding, name_width: int, width: int, colour: bool) -> Iterator[str]:
    """``  status  name  detail``, the detail wrapped in its column and the mend below it."""
    column = 2 + _STATUS_WIDTH + 2 + name_width + 2
    wrap = textwrap.TextWrapper(
        max(width - column, 20), break_on_hyphens=False, break_long_words=False
    )
    body = wrap.wrap(finding.detail)
    if finding.mend:
        wrap.subsequent_indent = "  "
        body += wrap.wrap(f"> {finding.mend}")
    status = f"{finding.status:<{_STATUS_WIDTH}}"
    if colour:
        status = f"\x1b[{_COLOURS[finding.status]}m{status}\x1b[0m"
    first, *others = body or [""]
    yield f"  {status}  {finding.name:<{name_width}}  {first}".rstrip()
    for line in others:
        yield " " * column + line
