from __future__ import annotations

from pathlib import Path

import pytest

from guestfault.cli.main import main


@pytest.fixture(autouse=True)
def empty_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_list_without_anything_says_how_to_get_it(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["lab", "list"]) == 0
    told = capsys.readouterr().out
    assert "QEMU: no qemu-system-x86_64 on this system" in told
    assert "guestfault lab fetch --bochs gets one" in told


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--kernel", "/etc/passwd", "--", "x"], "/etc/passwd: not an x86 kernel image"),
        (["--kernel", "/nonexistent/bzImage", "--", "x"], "bzImage: No such file or directory"),
        (["--kernel", "6.12", "--", "x"], "guestfault lab fetch 6.12"),
    ],
)
def test_a_kernel_that_cannot_be_started_is_one_line(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(["lab", "run", *words]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert said in captured.err


@pytest.mark.parametrize(
    "words",
    [
        ["lab"],
        ["lab", "run", "--", "x"],
        ["lab", "run", "--kernel", "6.12"],
        ["lab", "run", "--kernel", "6.12", "--timeout", "0", "--", "x"],
        ["lab", "run", "--kernel", "6.12", "--smp", "-1", "--", "x"],
        ["lab", "run", "--kernel", "6.12", "--npt", "0", "--ept", "1", "--", "x"],
        ["lab", "run", "--kernel", "6.12", "--npt", "1", "--ept", "1", "--", "x"],
        ["lab", "run", "--kernel", "6.12", "--ept", "2", "--", "x"],
        ["lab", "run", "--kernel", "6.12", "--file", "nocolon", "--", "x"],
        ["lab", "fetch"],
    ],
)
def test_a_wrong_command_line(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 2
    assert "usage" not in capsys.readouterr().err


def test_fetch_without_apt_says_what_it_needs(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    assert main(["lab", "fetch", "6.12"]) == 2
    assert "no apt-get on this system" in capsys.readouterr().err
