from __future__ import annotations

import json
import sys

import pytest

from guestfault.check.finding import Status
from guestfault.cli.main import main


def test_the_table_goes_to_a_pipe_without_colours(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")  # not the width of whoever runs the tests
    assert main(["check"]) == 0
    table = capsys.readouterr().out
    assert "\x1b" not in table
    assert max(map(len, table.splitlines())) <= 80
    assert "  ok       software KVM" in table.splitlines()


def test_the_json_is_one_object_of_the_documented_shape(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["check", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document.keys() == {
        "schema",
        "guestfault",
        "kernel",
        "machine",
        "uid",
        "ready",
        "subjects",
    }
    assert set(document["ready"].values()) <= set(Status)
    for subject in document["subjects"]:
        assert subject.keys() == {"title", "findings"}
        for finding in subject["findings"]:
            assert finding.keys() == {"name", "status", "detail", "mend", "needed_for"}
            assert finding["status"] in set(Status)
            assert set(finding["needed_for"]) <= document["ready"].keys()


def test_without_the_software_kvm_the_status_is_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "unicorn", None)  # as if it were not installed
    assert main(["check"]) == 1
    assert "  missing  software KVM        see unicorn" in capsys.readouterr().out.splitlines()
