from __future__ import annotations

import json
import re

import pytest

from guestfault.cli.main import main
from guestfault.dialect.published import DIALECTS
from guestfault.explore.scenarios import SCENARIOS

CELL = ["explore", "vcpu-not-loaded", "--dialect", "seed", "--preemptions", "1"]


@pytest.mark.timeout(60)
def test_the_table_goes_to_a_pipe_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CELL, "--dialect", "linux-6.8"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert out.splitlines()[0].split() == ["seed", "linux-6.8"]
    assert out.splitlines()[1].split() == ["vcpu-not-loaded", "warned", "-"]
    assert max(len(line) for line in out.splitlines() if "--replay" not in line) <= 120


@pytest.mark.timeout(60)
def test_what_the_table_prints_can_be_replayed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(CELL) == 0
    found = re.search(r"--replay (\S+)", capsys.readouterr().out)
    assert found is not None
    assert main(["explore", "--replay", found[1]]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("vcpu-not-loaded, seed: ")
    assert lines[1].startswith("warned: ")
    assert lines[2].endswith(found[1])
    assert lines[4].split()[:2] == ["step", "vcpu0"]


@pytest.mark.timeout(60)
def test_the_json_is_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CELL, "--json", "--jobs", "2"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["dialects"] == ["seed"]
    (cell,) = document["cells"]
    assert (cell["scenario"], cell["verdict"]) == ("vcpu-not-loaded", "warned")
    assert cell["exhausted"] == cell["bound"] == 1


def test_the_list_has_each_scenario_and_dialect(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explore", "--list"]) == 0
    words = {line.split()[0] for line in capsys.readouterr().out.splitlines()}
    assert {*SCENARIOS, *DIALECTS} <= words


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["nonsense"], "there is no scenario 'nonsense'; there are "),
        (["--dialect", "v9"], "there is no dialect 'v9'; there are "),
        (["--replay", "nonsense"], "replay string 'nonsense': not of the form"),
    ],
)
def test_what_is_not_there_is_an_error_in_one_line(
    capsys: pytest.CaptureFixture[str], options: list[str], said: str
) -> None:
    assert main(["explore", *options]) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"guestfault: {said}")
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "options", [["--preemptions", "-1"], ["--jobs", "0"], ["--limit", "many"], ["--jobs", "two"]]
)
def test_a_number_must_be_one(capsys: pytest.CaptureFixture[str], options: list[str]) -> None:
    with pytest.raises(SystemExit) as raised:
        main(["explore", *options])
    assert raised.value.code == 2
    assert options[0] in capsys.readouterr().err


@pytest.mark.timeout(60)
def test_whoever_watches_sees_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert main(CELL) == 0
    err = capsys.readouterr().err
    assert err.startswith("\r1 of 1 cells, ")
    assert err.endswith("\r\x1b[K")
