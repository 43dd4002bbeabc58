"""Whole tables: a column for each KVM, and their JSON.

A document holds all that was recorded, and nothing of when or where, so that the file of a run can
be kept, compared with the next one, and committed.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from guestfault.conform.record import SKIPPED, Result
from guestfault.errors import GuestfaultError

__all__ = ["Column", "Document", "DocumentError", "Outcomes", "load", "save"]

FORMAT = "guestfault conform, 1"


class DocumentError(GuestfaultError):
    """A file that holds no table of ours: ``path``, and ``why``."""

    def __init__(self, path: str, why: str) -> None:
        self.path = path
        self.why = why
        super().__init__(f"{path}: {why}; it takes what guestfault conform --json has written")


@dataclass
class Outcomes:
    """A case on a KVM: each different result, and how often it came; the most frequent first."""

    results: list[tuple[int, Result]]

    @classmethod
    def of(cls, results: Iterable[Result]) -> Outcomes:
        """Count them."""
        counted: list[tuple[int, Result]] = []
        for result in results:
            for i, (count, known) in enumerate(counted):
                if known == result:
                    counted[i] = count + 1, known
                    break
            else:
                counted.append((1, result))
        return cls.sorted(counted)

    @classmethod
    def sorted(cls, counted: Iterable[tuple[int, Result]]) -> Outcomes:
        """Those that are counted already; equal counts in an order of their own."""
        return cls(sorted(counted, key=lambda pair: (-pair[0], json.dumps(pair[1].to_json()))))

    @property
    def first(self) -> Result:
        """The most frequent."""
        return self.results[0][1]

    @property
    def flaps(self) -> bool:
        """Whether it was not the same each time."""
        return len(self.results) > 1

    @property
    def skipped(self) -> bool:
        """Whether it did not run."""
        return self.first.word == SKIPPED

    @property
    def word(self) -> str:
        """The cell: a word, or each word with how often."""
        words: dict[str, int] = {}
        for count, result in self.results:
            words[result.word] = words.get(result.word, 0) + count
        if len(words) == 1:
            return next(iter(words))
        total = sum(words.values())
        return ", ".join(f"{word} {count}/{total}" for word, count in words.items())


@dataclass
class Column:
    """A KVM: its name, what is known of it, and its results by case."""

    name: str
    about: dict[str, str] = field(default_factory=dict)
    cases: dict[str, Outcomes] = field(default_factory=dict)


@dataclass
class Document:
    """A table."""

    columns: list[Column] = field(default_factory=list)

    @property
    def case_names(self) -> list[str]:
        """Of all columns, in the order of their first appearance."""
        return list(dict.fromkeys(name for column in self.columns for name in column.cases))

    def take_in(self, other: Document) -> None:
        """Put what another has in, case by case, in the place of what is here."""
        known = {column.name: column for column in self.columns}
        for new in other.columns:
            if (column := known.get(new.name)) is None:
                self.columns.append(new)
            else:
                column.about = new.about
                column.cases |= new.cases

    def to_json(self) -> str:
        """A line for each different result of a case, with the KVMs that it came on."""
        head = ",\n".join(
            json.dumps({"name": column.name, "about": column.about}) for column in self.columns
        )
        cases = ",\n".join(
            f"{json.dumps(name)}: [\n{self._case_json(name)}\n]" for name in self.case_names
        )
        return f'{{"format": {json.dumps(FORMAT)}, "kvms": [\n{head}\n], "cases": {{\n{cases}\n}}}}'

    def _case_json(self, name: str) -> str:
        results: list[Result] = []
        times: list[dict[str, int]] = []
        for column in self.columns:
            for count, result in column.cases[name].results if name in column.cases else ():
                if result not in results:
                    results.append(result)
                    times.append({})
                times[results.index(result)][column.name] = count
        lines = []
        for result, on in zip(results, times, strict=True):
            value = result.to_json()
            del value["case"]
            lines.append(json.dumps({"times": on, **value}, separators=(",", ":")))
        return ",\n".join(lines)

    @classmethod
    def from_json(cls, text: str, path: str = "the text") -> Document:
        """The reverse.  Raises :class:`DocumentError`."""
        try:
            value = json.loads(text)
            if value["format"] != FORMAT:
                raise DocumentError(path, f"its format is {value['format']!r}, not {FORMAT!r}")
            return _document(value)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DocumentError(path, f"this is no table of results ({error!r})") from None


def save(document: Document, path: str) -> None:
    """Write a document into a file.  Raises :class:`DocumentError`."""
    try:
        Path(path).write_text(document.to_json() + "\n")
    except OSError as error:
        raise DocumentError(path, f"it cannot be written: {error.strerror}") from None


def load(path: str) -> Document:
    """The document in a file.  Raises :class:`DocumentError`."""
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "not text"
        raise DocumentError(path, f"it cannot be read: {why}") from None
    return Document.from_json(text, path)


def _document(value: dict[str, Any]) -> Document:
    columns = {kvm["name"]: Column(str(kvm["name"]), dict(kvm["about"])) for kvm in value["kvms"]}
    for name, entries in value["cases"].items():
        found: dict[str, list[tuple[int, Result]]] = {}
        for entry in entries:
            members = dict(entry)
            on = members.pop("times")
            result = Result.from_json({"case": name, **members})
            for kvm, count in on.items():
                found.setdefault(kvm, []).append((int(count), result))
        for kvm, results in found.items():
            columns[kvm].cases[name] = Outcomes.sorted(results)
    return Document(list(columns.values()))
