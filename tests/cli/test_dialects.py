"""``guestfault dialects`` as its user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guestfault.cli.main import main
from guestfault.dialect.published import DIALECTS

PAGE = Path(__file__).parents[2] / "docs" / "dialects.md"


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dialects"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[0] == "dialect"
    assert [line.split()[0] for line in lines[1 : 1 + len(DIALECTS)]] == list(DIALECTS)


@pytest.mark.parametrize("name", DIALECTS)
def test_everything_about_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dialects", name]) == 0
    assert capsys.readouterr().out.startswith(f"{name}: ")


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dialects", "--json"]) == 0
    records = json.loads(capsys.readouterr().out)
    assert [record["name"] for record in records] == list(DIALECTS)
    assert main(["dialects", "v5", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == records[list(DIALECTS).index("v5")]


def test_one_that_there_is_not(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dialects", "v8"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("guestfault: dialect 'v8': not known; known are v1, wip-v2, seed, v3")


def test_the_manual_shows_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["dialects"]) == 0
    assert capsys.readouterr().out in PAGE.read_text()
    assert main(["dialects", "v5"]) == 0
    assert capsys.readouterr().out in PAGE.read_text()


@pytest.mark.parametrize("name", DIALECTS)
def test_the_manual_has_a_section_for_each_with_its_source(name: str) -> None:
    text = PAGE.read_text()
    assert f"## `{name}`" in text or f", `{name}`" in text
    assert DIALECTS[name].source in text or name == "linux-7.3"


@pytest.mark.timeout(120)
@pytest.mark.parametrize("name", DIALECTS)
def test_run_speaks_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["run", "--kvm", "soft", "--dialect", name, "--memory", "256K", "--json"]
    assert main(words) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["kvm"], document["verdict"]) == (f"softkvm ({name})", "right")
    [vcpu] = document["vcpus"]
    told = not name.startswith("linux-")
    assert (vcpu["annotated"] > 0, vcpu["bare"] > 0) == (told, not told)
