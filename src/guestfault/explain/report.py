"""An :class:`~guestfault.explain.account.Account` as text for people and as JSON for programs.

In JSON, addresses and registers are hexadecimal strings, because not every reader of JSON keeps 64
bits; sizes, levels and line numbers are numbers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from guestfault.explain.account import Account, Candidate
from guestfault.explain.translate import Translated

__all__ = ["as_json", "as_text"]


def as_text(account: Account, *, number: int, total: int) -> str:
    """A paragraph for each of: where it stopped, the accesses in order of rank, the notes."""
    return "\n".join(_lines(account, number, total))


def _lines(account: Account, number: int, total: int) -> Iterator[str]:
    dump = account.dump
    cpu = "" if dump.cpu is None else f", CPU {dump.cpu}"
    yield f"Dump {number} of {total} (line {dump.line}{cpu}): {_failure(account)}"
    if dump.rip is not None:
        yield f"  mode         {account.mode}, CPL {account.cpl}"
        shown = account.instruction or "not known"
        raw = account.instruction_bytes.hex(" ")
        yield f"  instruction  {dump.rip:#x}: {shown}" + (f"   [{raw}]" if raw else "")
    yield f"  {account.conclusion}."
    if account.candidates:
        yield "  Accesses, most likely first:"
    for rank, candidate in enumerate(account.candidates, 1):
        yield from _candidate(rank, candidate)
    for note in account.notes:
        yield f"  Note: {note}."


def _failure(account: Account) -> str:
    failure = account.dump.failure
    return failure.text if failure else "no error line"


def _candidate(rank: int, candidate: Candidate) -> Iterator[str]:
    access = candidate.access
    yield f"    {rank}. {access}: {candidate.likelihood}, {candidate.why}"
    indent = " " * 7
    if access.note:
        yield f"{indent}{access.note}"
    if access.crosses_page:
        pages = " and ".join(f"{part.size} bytes at {part.address:#x}" for part in access.pages())
        yield f"{indent}crosses a page: {pages}"
    for part in candidate.parts:
        yield f"{indent}{_part(part)}"
    for hint in candidate.hints:
        yield f"{indent}hint: {hint}"


def _part(part: Translated) -> str:
    if part.gpa is None:
        return f"{part.address:#x}: the walk stops: {part.stop}"
    return f"{part.address:#x} is gpa {part.gpa:#x}" + (f"; {part.stop}" if part.stop else "")


def as_json(account: Account) -> dict[str, Any]:
    """The same facts, one object for a dump."""
    dump = account.dump
    return {
        "line": dump.line,
        "cpu": dump.cpu,
        "error": dump.failure.text if dump.failure else None,
        "errno": dump.failure.errno if dump.failure else None,
        "architecture": dump.architecture,
        "mode": account.mode,
        "cpl": account.cpl,
        "rip": None if dump.rip is None else hex(dump.rip),
        "instruction": account.instruction,
        "bytes": account.instruction_bytes.hex(),
        "conclusion": account.conclusion,
        "accesses": [_json_candidate(candidate) for candidate in account.candidates],
        "notes": list(account.notes),
    }


def _json_candidate(candidate: Candidate) -> dict[str, Any]:
    access = candidate.access
    return {
        "address": None if access.address is None else hex(access.address),
        "size": access.size,
        "kind": str(access.kind),
        "role": str(access.role),
        "certain": access.certain,
        "physical": access.physical,
        "crosses_page": access.crosses_page,
        "pages": [{"address": hex(part.address), "size": part.size} for part in access.pages()],
        "span": None
        if access.span is None
        else {"address": hex(access.span[0]), "size": access.span[1]},
        "note": access.note,
        "likelihood": str(candidate.likelihood),
        "why": candidate.why,
        "hints": list(candidate.hints),
        "translations": [
            {
                "address": hex(part.address),
                "size": part.size,
                "gpa": None if part.gpa is None else hex(part.gpa),
                "stop": part.stop,
            }
            for part in candidate.parts
        ],
    }
