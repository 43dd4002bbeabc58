"""``guestfault conform`` as its user meets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from guestfault.cli.main import main
from guestfault.conform.case import CASES
from guestfault.conform.page import BEGIN, END
from guestfault.conform.target import Target, parse
from guestfault.errors import GuestfaultError
from guestfault.lab.kernels import fetched
from guestfault.lab.qemu import find_qemu

SOFT = ["--on", "soft:linux-7.3"]
CASE = "prot-none/read/cpl3"


def test_the_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conform", "--list"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(CASES)


@pytest.mark.timeout(60)
def test_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conform", *SOFT, "--on", "soft:seed", "--case", CASE, "normal/read/cpl3"]) == 0
    out, err = capsys.readouterr()
    assert out.splitlines()[0].split() == ["soft:linux-7.3", "soft:seed"]
    assert out.splitlines()[1].split() == ["normal/read/cpl3", "completes", "completes"]
    assert out.splitlines()[2].split() == ["!", CASE, "bare", "annotated"]
    assert err == "", "nobody watches"


@pytest.mark.timeout(60)
def test_everything_of_one_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["conform", *SOFT, "--details", CASE]) == 0
    out = capsys.readouterr().out
    assert "access   bare: KVM_RUN = -EFAULT, exit_reason 0, RIP at access" in out
    assert "ends right, the guest reports 0x11223344" in out


@pytest.mark.timeout(60)
def test_against_a_run_of_before(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = tmp_path / "before.json"
    assert main(["conform", *SOFT, "--json", CASE, "normal/read/cpl3"]) == 0
    before.write_text(capsys.readouterr().out)
    assert json.loads(before.read_text())["kvms"][0]["name"] == "soft:linux-7.3"
    assert main(["conform", *SOFT, "--against", str(before), CASE]) == 0
    assert capsys.readouterr().out == "soft:linux-7.3 -> soft:linux-7.3: 0 of 1 cases differ\n"
    assert main(["conform", "--on", "soft:seed", "--against", str(before), CASE]) == 1
    out = capsys.readouterr().out
    assert "1 of 1 cases differ" in out
    assert f"{CASE}: bare -> annotated" in out
    assert "access/0/exit_reason: 0 -> 38" in out


@pytest.mark.timeout(60)
def test_a_table_that_was_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept = tmp_path / "kept.json"
    assert main(["conform", *SOFT, "--json", CASE]) == 0
    kept.write_text(capsys.readouterr().out)
    assert main(["conform", "--from", str(kept)]) == 0
    assert CASE in capsys.readouterr().out
    assert main(["conform", "--from", str(kept), "--json"]) == 0
    assert capsys.readouterr().out == kept.read_text()
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    assert main(["conform", "--from", str(kept), "--page", str(page)]) == 0
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "| prot-none | read | cpl3 | bare |" in text
    assert "old" not in text


@pytest.mark.timeout(60)
def test_columns_are_put_into_a_table_that_is_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "kept.json"
    for on in ("soft:seed", "soft:linux-7.3", "soft:seed"):
        assert main(["conform", "--on", on, CASE, "--into", str(kept)]) == 0
    tables = capsys.readouterr().out
    assert "soft:seed  soft:linux-7.3" in tables
    assert [kvm["name"] for kvm in json.loads(kept.read_text())["kvms"]] == [
        "soft:seed",
        "soft:linux-7.3",
    ]


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--on", "hard"], "'hard' names no KVM: say soft[:DIALECT][,npt=0], kvm, or lab:KERNEL"),
        (["--on", "lab"], "'lab' names no KVM"),
        (["--on", "kvm,npt=0"], "this machine's KVM is as it was loaded"),
        (["--on", "kvm,ept=0"], "this machine's KVM is as it was loaded"),
        (["--on", "soft,ept=0"], "the software KVM is of no vendor"),
        (["--on", "lab:6.18,ept=2"], "'lab:6.18,ept=2' names no KVM"),
        (["--on", "soft:v9"], "v9"),
        (["nothing"], "no case is called 'nothing'"),
        (["--from", "/nowhere"], "/nowhere: it cannot be read"),
        (["--on", "soft", "--against", "/nowhere"], "/nowhere: it cannot be read"),
        (["--on", "lab:no-such-kernel", CASE], "no-such-kernel"),
    ],
)
def test_what_is_wrong_is_one_line(
    words: list[str], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["conform", *words]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert line in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("soft", Target("soft", "linux-7.3")),
        ("soft,npt=0", Target("soft", "linux-7.3", npt=False)),
        ("soft:seed,npt=1", Target("soft", "seed")),
        ("kvm", Target("kvm")),
        ("lab:6.18,npt=0", Target("lab", "6.18", npt=False)),
        ("lab:6.18,ept=1", Target("lab", "6.18", intel=True)),
        ("lab:6.18,ept=0", Target("lab", "6.18", npt=False, intel=True)),
        ("lab:/boot/vmlinuz-6.18", Target("lab", "/boot/vmlinuz-6.18")),
    ],
)
def test_the_name_of_a_kvm(text: str, target: Target) -> None:
    assert parse(text) == target
    assert parse(target.name) == target


@pytest.mark.timeout(180)
def test_in_the_lab(capsys: pytest.CaptureFixture[str]) -> None:
    try:
        find_qemu()
        kernels = fetched()
    except GuestfaultError as why:
        pytest.skip(f"the lab: {why}")
    if not kernels:
        pytest.skip("the lab: no kernel fetched; guestfault lab fetch 7.3")
    name = f"lab:{kernels[-1].release}"
    assert main(["conform", "--on", name, "--json", CASE, "normal/read/real"]) == 0
    value = json.loads(capsys.readouterr().out)
    [kvm] = value["kvms"]
    assert kvm["name"] == name
    assert (kvm["about"]["module"], kvm["about"]["tdp"]) == ("kvm_amd", "yes")
    assert value["cases"][CASE][0]["word"] == "bare"
    assert value["cases"]["normal/read/real"][0]["word"] == "completes"
