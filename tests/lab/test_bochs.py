"""Which Bochs is used and how it is started, and whole machines if somebody asks for them.

``GUESTFAULT_LAB_INTEL`` names their kernel.  They are real: a stock one, about a minute each.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest

from guestfault.cli.main import main
from guestfault.conform.document import Document
from guestfault.errors import Unavailable
from guestfault.lab.bochs import Bochs, find_bochs
from guestfault.lab.errors import (
    CannotEmulateError,
    EmulatorError,
    HungError,
    KernelPanicError,
    NeverBootedError,
    NoKvmError,
    StorageError,
)
from guestfault.lab.given import Given
from guestfault.lab.image import Kernel
from guestfault.lab.machine import run

Built = Callable[..., Kernel]
CPU = "corei7_haswell_4770"


def says(root: Path, text: str, *, display: bool = True) -> Path:
    """A Bochs below ``root`` that says ``text`` and where its plugins are, whatever it is asked."""
    plugins = root / "usr/lib/x86_64-linux-gnu/bochs/plugins"
    program = root / "usr/bin/bochs-bin"
    plugins.mkdir(parents=True, exist_ok=True)
    program.parent.mkdir(parents=True, exist_ok=True)
    if display:
        (plugins / "libbx_term_gui.so").touch()
    where = f"LTDL_LIBRARY_PATH not set. using compile time default '{plugins}'"
    program.write_text(f'#!/bin/sh\necho "{where}" >&2\n{text}\n')
    program.chmod(0o755)
    return program


GOOD = f"echo Bochs x86 Emulator 2.7; echo {CPU}"


def test_the_systems_own_is_used_if_it_serves(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fetched = says(empty_store / "bochs", GOOD)
    system = says(tmp_path / "system", GOOD.replace("2.7", "3.0"))
    monkeypatch.setenv("PATH", str(system.parent))
    assert find_bochs() == Bochs(system, (3, 0))
    for lacks in (GOOD.replace(CPU, "pentium"), "exit 1", "echo"):
        says(tmp_path / "system", lacks)
        assert find_bochs() == Bochs(fetched, (2, 7), empty_store / "bochs")


def test_one_with_a_window_alone_is_passed_by(
    tmp_path: Path, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    system = says(tmp_path / "system", GOOD, display=False)
    monkeypatch.setenv("PATH", str(system.parent))
    with pytest.raises(Unavailable, match="guestfault lab fetch --bochs"):
        find_bochs()


def test_a_fetched_one_that_does_not_run_says_so(
    empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent:/usr/bin:/bin")
    says(empty_store / "bochs", "echo 'libgtk-3.so.0: cannot open' >&2; exit 127")
    with pytest.raises(Unavailable, match=r"libgtk-3.so.0: cannot open; remove .* and fetch"):
        find_bochs()


def test_a_machine_needs_one(
    built: Built, empty_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Unavailable, match="Bochs: none on this system"):
        run(built(), ["x"], ept=True)


def test_everything_is_given_as_open_files_which_are_closed_again(
    built: Built, resources: Callable[[], dict[str, int]]
) -> None:
    kernel = built()
    before = resources()["descriptors"]
    with ExitStack() as stack:
        given = Given(stack)
        command = Bochs(Path("bochs"), (2, 7)).give(given, kernel, [b"x"], "line", 256, 1)
        text = Path(command[-1]).read_text()
        for descriptor in given.descriptors[:3]:
            assert f"/proc/self/fd/{descriptor}" in text
        assert "memory: guest=256" in text
        assert given.input is not None
        assert os.read(given.input, 9) == b"c\n"
    assert resources()["descriptors"] == before


def test_what_it_cannot_emulate_is_refused(built: Built) -> None:
    bochs = Bochs(Path("/nonexistent"), (2, 7))
    with pytest.raises(CannotEmulateError, match="one processor, not 2"):
        run(built(), ["x"], processors=2, emulator=bochs)
    with pytest.raises(CannotEmulateError, match="at most 2048 MiB, not 4096"):
        run(built(), ["x"], memory=4096, emulator=bochs)


def test_one_that_is_gone_or_refuses(built: Built) -> None:
    with pytest.raises(StorageError, match="No such file"):
        run(built(), ["x"], emulator=Bochs(Path("/nonexistent"), (2, 7)))
    with pytest.raises(EmulatorError, match="Bochs ended with exit status 1: before the kernel"):
        run(built(), ["x"], emulator=Bochs(Path("/bin/false"), (2, 7)))


@pytest.mark.parametrize(
    ("said", "why"),
    [
        ("", ("", False)),
        ("i[PLUGIN] loaded\n", ("", False)),
        (
            "=====\nBochs is exiting with the following message:\n"
            "[CPU0  ] exception(): 3rd (13) exception with no resolution\n=====\n",
            ("exception(): 3rd (13) exception with no resolution", True),
        ),
        (
            "Bochs is exiting with the following message:\n[HD    ] ata0-0: could not open\n==\n",
            ("ata0-0: could not open", False),
        ),
    ],
)
def test_its_last_words(said: str, why: tuple[str, bool]) -> None:
    assert Bochs(Path("bochs"), (2, 7)).last_words(said, 1) == why


# -- real machines -------------------------------------------------------------------------------


def python(code: str) -> list[str]:
    return ["python3", "-c", code]


@pytest.mark.timeout(600)
def test_an_access_on_kvm_intel(intel_kernel: Kernel, capsys: pytest.CaptureFixture[str]) -> None:
    """With nested and with shadow page tables; an absent page table tells them apart."""
    kvms = [f"lab:{intel_kernel.image},ept={ept}" for ept in (1, 0)]
    cases = ["prot-none/read/cpl3", "prot-none/walk-read/cpl3"]
    words = [word for kvm in kvms for word in ("--on", kvm)]
    assert main(["conform", *words, "--json", *cases]) == 0
    columns = Document.from_json(capsys.readouterr().out).columns
    about = [(kvm.name, kvm.about["module"], kvm.about["tdp"]) for kvm in columns]
    assert about == [(kvms[0], "kvm_intel", "yes"), (kvms[1], "kvm_intel", "no")]
    found = [[kvm.cases[case].word for case in cases] for kvm in columns]
    assert found == [["bare", "bare"], ["bare", "#PF"]]


@pytest.mark.timeout(600)
def test_a_guest_completes_on_its_kvm(intel_kernel: Kernel) -> None:
    command = ["guestfault", "run", "--kvm", "kvm", "--memory", "256K", "--mode", "exit", "--json"]
    result = run(intel_kernel, command, ept=True, files=["/proc/cpuinfo"])
    assert result.status == 0, result.stderr.decode()
    assert json.loads(result.stdout)["verdict"] == "right"
    assert b"GenuineIntel" in result.files["/proc/cpuinfo"]
    assert result.warnings == []


@pytest.mark.timeout(600)
def test_a_panic_a_hang_and_no_kvm(intel_kernel: Kernel) -> None:
    """Everything that a machine said before its end arrives, whatever the end."""
    # The first process passes on what it reads, for which it needs the one processor.
    code = "print('before'); import time; time.sleep(1)"
    code += "; open('/proc/sysrq-trigger', 'w').write('c')"
    with pytest.raises(KernelPanicError, match="sysrq triggered crash") as panic:
        run(intel_kernel, python(code), ept=True)
    assert panic.value.stdout == b"before\n"
    bare = replace(intel_kernel, modules=None)
    with pytest.raises(NoKvmError, match="no modules came along"):
        run(bare, ["x"], ept=True)
    sleep = python("import time; print('on'); time.sleep(999)")
    with pytest.raises(HungError, match="within 30 s") as hung:
        run(bare, sleep, ept=True, timeout=30, needs_kvm=False)
    assert hung.value.stdout == b"on\n"
    with pytest.raises(NeverBootedError, match="within 3 s"):
        run(bare, ["x"], ept=True, boot_timeout=3)
