from __future__ import annotations

from pathlib import Path

import pytest

from guestfault.errors import Unavailable
from guestfault.lab.qemu import Qemu, find_qemu


def says(directory: Path, text: str) -> Path:
    """A program of QEMU's name that says ``text``, whatever it is asked."""
    program = directory / "qemu-system-x86_64"
    directory.mkdir(parents=True, exist_ok=True)
    program.write_text(f"#!/bin/sh\n{text}\n")
    program.chmod(0o755)
    return program


VERSION = "echo 'QEMU emulator version {} (Debian 1:x)'"


def test_a_new_one_of_the_systems_is_used_before_a_fetched_one(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = says(empty_store / "qemu/usr/bin", VERSION.format("10.0.2"))
    system = says(tmp_path / "bin", VERSION.format("11.1.0"))
    monkeypatch.setenv("PATH", f"{tmp_path}/bin")
    assert find_qemu() == Qemu(system, (11, 1, 0))
    says(tmp_path / "bin", VERSION.format("7.2.19"))
    assert find_qemu() == Qemu(fetched, (10, 0, 2), empty_store / "qemu")
    fetched.unlink()
    assert find_qemu() == Qemu(system, (7, 2, 19))


def test_without_one_the_step_is_named(empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Unavailable, match="guestfault lab fetch"):
        find_qemu()


def test_one_that_does_not_run(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    says(empty_store / "qemu/usr/bin", "echo 'libfdt.so.1: cannot open' >&2; exit 127")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(Unavailable, match=r"libfdt.so.1: cannot open; remove .* and fetch"):
        find_qemu()


def test_an_old_one_goes_without_the_instruction_that_fails_there() -> None:
    old, new = (Qemu(Path("qemu"), version) for version in ((7, 2, 0), (10, 0, 0)))
    assert "EPYC,+svm,+npt,-cx16" in old.command(memory=512, processors=1)
    assert "EPYC,+svm,+npt" in new.command(memory=512, processors=1)


def test_many_processors_are_emulated_by_one_thread() -> None:
    qemu = Qemu(Path("qemu"), (10, 0, 0))
    assert "tcg" in qemu.command(memory=512, processors=1)
    assert "tcg,thread=single" in qemu.command(memory=512, processors=2)
