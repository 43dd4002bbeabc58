"""What differs between two results, field by field.

A difference is a path and two values: ``access/0/payload/gpa``, the first exit of the phase
``access``.  Two kernels are compared so, and a kernel with the software KVM.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from guestfault.conform.document import Column, Document, Outcomes
from guestfault.conform.record import Phase, Result

__all__ = ["CaseDifference", "Difference", "against", "compare", "differences"]

_ABSENT = "-"


@dataclass(frozen=True)
class Difference:
    """``path`` names a field; ``left`` and ``right`` are what it holds."""

    path: str
    left: Any
    right: Any


@dataclass(frozen=True)
class CaseDifference:
    """A case that two KVMs do not agree on."""

    case: str
    left: Outcomes
    right: Outcomes
    fields: tuple[Difference, ...]


def differences(left: Result, right: Result) -> list[Difference]:
    """Each field that is not the same; none for equal results."""
    one, other = _flat(left), _flat(right)
    paths = list(dict.fromkeys([*one, *other]))
    found = [Difference(p, one.get(p, _ABSENT), other.get(p, _ABSENT)) for p in paths]
    return [difference for difference in found if difference.left != difference.right]


def compare(left: Column, right: Column) -> list[CaseDifference]:
    """The cases that both ran, and on which they do not agree.

    What flaps agrees with what flaps in the same way, however often.
    """
    found = []
    for name, one in left.cases.items():
        other = right.cases.get(name)
        if other is None or one.skipped or other.skipped:
            continue
        if _same(one, other):
            continue
        fields = tuple(differences(one.first, other.first))
        found.append(CaseDifference(name, one, other, fields))
    return found


def against(before: Document, after: Document) -> list[tuple[Column, Column, list[CaseDifference]]]:
    """Each KVM of ``after`` with the one of its name in ``before``.

    With one KVM on either side, these two are meant, whatever their names.  A case that ran on one
    side only is a difference too.
    """
    if len(before.columns) == len(after.columns) == 1:
        pairs = [(before.columns[0], after.columns[0])]
    else:
        known = {column.name: column for column in before.columns}
        pairs = [(known[c.name], c) for c in after.columns if c.name in known]
    return [(old, new, [*compare(old, new), *_one_sided(old, new)]) for old, new in pairs]


def _one_sided(old: Column, new: Column) -> list[CaseDifference]:
    found = []
    for name, after in new.cases.items():
        before = old.cases.get(name)
        if before is not None and before.skipped != after.skipped:
            fields = tuple(differences(before.first, after.first))
            found.append(CaseDifference(name, before, after, fields))
    return found


def _same(one: Outcomes, other: Outcomes) -> bool:
    left, right = [r for _, r in one.results], [r for _, r in other.results]
    return len(left) == len(right) and all(result in right for result in left)


def _flat(result: Result) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in asdict(result).items():
        if name not in ("case", "phases"):
            flat[name] = value
    for phase in result.phases:
        flat |= _flat_phase(phase)
    return flat


def _flat_phase(phase: Phase) -> dict[str, Any]:
    flat: dict[str, Any] = {f"{phase.name}/blocked": phase.blocked}
    for i, exit_ in enumerate(phase.exits):
        for name, value in asdict(exit_).items():
            if name == "payload":
                for key, part in value.items():
                    flat[f"{phase.name}/{i}/payload/{key}"] = part
            else:
                flat[f"{phase.name}/{i}/{name}"] = value
    return flat
