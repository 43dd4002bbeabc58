"""What the documentation names exists: tests, functions, files, pages."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [*sorted((ROOT / "docs").glob("*.md")), ROOT / "README.md", ROOT / "CONTRIBUTING.md"]
SOURCE = ROOT / "src" / "guestfault"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    missing = [
        target
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
        if "://" not in target and not (page.parent / target).exists()
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_tests_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    for file, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", text):
        assert (ROOT / file).exists(), f"{page.name} names {file}"
        if name:
            assert f"def {name}(" in (ROOT / file).read_text(), f"{page.name} names {file}::{name}"


def functions_of_the_thread() -> Iterator[tuple[str, str]]:
    text = (ROOT / "docs" / "thread.md").read_text()
    for file, names in re.findall(r"`([\w/]+\.py)`: ((?:`\w+`(?:, )?)+)", text):
        for name in re.findall(r"`(\w+)`", names):
            yield file, name


@pytest.mark.parametrize(("file", "name"), [*functions_of_the_thread()])
def test_the_thread_s_functions_are_where_the_page_says(file: str, name: str) -> None:
    places = [ROOT / file, SOURCE / file, SOURCE / "softkvm" / file]
    text = next((place.read_text() for place in places if place.exists()), "")
    assert re.search(rf"^\s*(?:def |class )?{name}\b", text, re.MULTILINE), f"no {name} in {file}"
