"""The software KVM held against a real one: what they disagree on, and why.

For each real kernel there is a dialect of the software KVM that claims to do as it does: every case
that both can run must come out the same.  Where it does not, the software KVM is at fault, or there
is a reason, which has a name and a line in ``data/explanations.json``::

    {"name": "...", "kvm": "...", "cases": ["..."], "fields": ["..."], "why": "..."}

``kvm`` is a fact of the real one, ``module=kvm_pvm`` or ``kernel=6.12.*`` (several with a comma),
or empty for all; ``cases`` and ``fields`` are patterns, and the paths of fields those of
:mod:`~guestfault.conform.compare`; no ``fields`` are all.  A case is explained when each of its
fields is; the first that covers a field names it.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cache
from importlib.resources import files

from guestfault.conform.compare import CaseDifference, compare
from guestfault.conform.document import Column
from guestfault.conform.target import Target

__all__ = ["Disagreement", "Explanation", "disagreements", "explanations", "matching_soft"]

# The first release that each dialect is like, as far as the cases can tell.  In 6.18 guest_memfd
# can be mapped, which linux-6.8 does not know.
_NEWEST, _MERGED = (6, 18), (6, 8)


@dataclass(frozen=True)
class Explanation:
    """Why a real KVM differs from the software one: see the module."""

    name: str
    kvm: str
    cases: tuple[str, ...]
    fields: tuple[str, ...]
    why: str

    def covers(self, case: str, path: str, about: dict[str, str]) -> bool:
        """Whether it explains a field of a case on the KVM with these facts."""
        facts = [fact.split("=", 1) for fact in self.kvm.split(",") if fact]
        return (
            all(fnmatchcase(about.get(key, ""), value) for key, value in facts)
            and any(fnmatchcase(case, pattern) for pattern in self.cases)
            and (not self.fields or any(fnmatchcase(path, pattern) for pattern in self.fields))
        )


@dataclass(frozen=True)
class Disagreement:
    """A case on which the two differ; ``explained`` by these, unless ``open_fields`` are left."""

    difference: CaseDifference
    explained: tuple[Explanation, ...]
    open_fields: tuple[str, ...]


@cache
def explanations() -> tuple[Explanation, ...]:
    """Those in the data file."""
    text = (files("guestfault.conform") / "data" / "explanations.json").read_text()
    return tuple(
        Explanation(
            entry["name"],
            entry["kvm"],
            tuple(entry["cases"]),
            tuple(entry.get("fields", ())),
            entry["why"],
        )
        for entry in json.loads(text)
    )


def matching_soft(about: dict[str, str]) -> Target | None:
    """The software KVM that claims to do as a real one does; ``None`` if there is none."""
    release = re.match(r"(\d+)\.(\d+)", about.get("kernel", ""))
    if release is None:
        return None
    version = int(release[1]), int(release[2])
    if version < _MERGED:
        return None
    dialect = "linux-7.3" if version >= _NEWEST else "linux-6.8"
    return Target("soft", dialect, about.get("tdp") == "yes")


def disagreements(soft: Column, real: Column) -> list[Disagreement]:
    """Every case that both ran and that does not come out the same."""
    found = []
    for difference in compare(soft, real):
        used: list[Explanation] = []
        left = []
        for field in difference.fields:
            covering = [
                e for e in explanations() if e.covers(difference.case, field.path, real.about)
            ]
            used += [e for e in covering[:1] if e not in used]
            if not covering:
                left.append(field.path)
        found.append(Disagreement(difference, tuple(used), tuple(left)))
    return found
