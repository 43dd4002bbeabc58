"""Tables as JSON: they come back as they went, and what is no table is one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from guestfault.conform.document import Column, Document, DocumentError, Outcomes, load
from guestfault.conform.record import Exit, Phase, Result

words = st.sampled_from(["bare", "MMIO", "completes", "skipped"])
exits = st.builds(
    Exit,
    ret=st.sampled_from([0, -14]),
    errno=st.sampled_from(["", "EFAULT"]),
    exit_reason=st.none() | st.integers(0, 45),
    word=words,
    payload=st.dictionaries(st.sampled_from(["gpa", "size"]), st.integers(0, 9) | st.text()),
    union=st.lists(st.tuples(st.integers(0, 255), st.just("00ff")).map(list), max_size=2),
    rip=st.sampled_from(["access", "after"]),
)
phases = st.builds(
    Phase,
    name=st.sampled_from(["access", "again"]),
    exits=st.lists(exits, max_size=2),
    blocked=st.none() | st.just({"event": "missing", "write": True}),
)


@st.composite
def documents(draw: st.DrawFn) -> Document:
    columns = []
    for name in draw(st.lists(st.sampled_from("abc"), unique=True)):
        cases = {}
        for case in draw(st.lists(st.sampled_from(["x/read", "y/read"]), unique=True)):
            results = st.builds(
                Result,
                case=st.just(case),
                word=words,
                phases=st.lists(phases, max_size=2),
                ending=st.sampled_from(["", "right"]),
                signals=st.lists(st.just("SIGBUS"), max_size=2),
            )
            cases[case] = Outcomes.of(draw(st.lists(results, min_size=1, max_size=3)))
        columns.append(Column(name, {"kernel": "6.18"}, cases))
    return Document(columns)


def by_case(document: Document) -> list[Column]:
    for column in document.columns:
        column.cases = dict(sorted(column.cases.items()))
    return document.columns


@given(documents())
def test_json_and_back(document: Document) -> None:
    assert by_case(Document.from_json(document.to_json())) == by_case(document)


def result(word: str) -> Result:
    return Result("x/read", word)


def test_a_cell_that_flaps_shows_how_often() -> None:
    outcomes = Outcomes.of([result("MMIO"), result("bare"), result("bare")])
    assert outcomes.flaps
    assert outcomes.word == "bare 2/3, MMIO 1/3"
    assert outcomes.first.word == "bare"


def test_details_that_flap_under_one_word_flap() -> None:
    other = Result("x/read", "bare", ending="right")
    outcomes = Outcomes.of([result("bare"), other])
    assert outcomes.flaps
    assert outcomes.word == "bare"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{}",
        '{"format": "another"}',
        '{"format": "guestfault conform, 1"}',
        '{"format": "guestfault conform, 1", "kvms": [], "cases": {"x": [{"times": {"k": 1}}]}}',
        '{"format": "guestfault conform, 1", "kvms": [], "cases": {"x": [3]}}',
        '{"format": "guestfault conform, 1", "kvms": 3, "cases": {}}',
    ],
)
def test_what_is_no_table(text: str, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    path.write_text(text)
    with pytest.raises(DocumentError, match=r"table\.json: .*guestfault conform --json"):
        load(str(path))


@pytest.mark.parametrize("content", [None, b"\xff\xfe\xff"])
def test_what_cannot_be_read(content: bytes | None, tmp_path: Path) -> None:
    path = tmp_path / "table.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DocumentError, match="cannot be read"):
        load(str(path))


def test_equal_results_share_a_line() -> None:
    one, other = (Column(name, {}, {"x/read": Outcomes.of([result("bare")])}) for name in "ab")
    value = json.loads(Document([one, other]).to_json())
    assert value["cases"]["x/read"] == [{"times": {"a": 1, "b": 1}, "word": "bare"}]
