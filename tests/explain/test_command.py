"""``guestfault explain`` from its arguments to its exit status."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from guestfault.cli.main import main


@pytest.fixture
def log(dumps: SimpleNamespace, tmp_path: Path) -> Path:
    path = tmp_path / "vm.log"
    path.write_text("starting\n" + dumps.qemu64("8b 03", {"RBX": 0x5FFE}) * 2)
    return path


def test_text(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", str(log)]) == 0
    out = capsys.readouterr().out
    assert out.count("mov eax, [rbx]") == 2
    assert "crosses a page: 2 bytes at 0x5ffe and 2 bytes at 0x6000" in out


def test_json(log: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["explain", "--json", str(log)]) == 0
    first, second = json.loads(capsys.readouterr().out)
    assert (first["line"], first["errno"], second["rip"]) == (2, 14, "0x100000")
    assert first["accesses"][0]["address"] == "0x5ffe"
    assert first["accesses"][0]["pages"][1] == {"address": "0x6000", "size": 2}


def test_standard_input(
    dumps: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = dumps.qemu64("8b 03", {"RBX": 0x5000}).encode()
    monkeypatch.setattr("sys.stdin", SimpleNamespace(buffer=io.BytesIO(b"\xff\x80" + text)))
    assert main(["explain", "-"]) == 0
    assert "0x5000" in capsys.readouterr().out


def test_memory(dumps: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dump, image = tmp_path / "dump", tmp_path / "image"
    dump.write_text(dumps.qemu32("8b 03", {"EBX": 0x8000, "EIP": 0x100}))
    image.write_bytes(bytes(0x4000))
    assert main(["explain", "--memory", str(image), str(dump)]) == 0
    assert "gpa 0x8000 is not in the image" in capsys.readouterr().out


@pytest.mark.parametrize("argument", ["/nonexistent", "/", "/dev/null", "/proc/self/status"])
def test_no_dump_is_status_2_and_one_line(
    argument: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["explain", argument]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert len(captured.err.strip().splitlines()) == 1
    assert argument in captured.err
