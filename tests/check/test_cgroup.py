from __future__ import annotations

from pathlib import Path

import pytest

from guestfault.check import cgroup
from guestfault.check.finding import Finding, Status

NO_LIMIT_V1 = "9223372036854771712\n"


def probe(root: Path, fstype: str, line: str) -> Finding:
    options = "rw,memory" if fstype == "cgroup" else "rw"
    (root / "mountinfo").write_text(f"1 1 0:1 / {root} rw - {fstype} {fstype} {options}\n")
    (root / "cgroup").write_text(line)
    return cgroup.probe(str(root / "cgroup"), str(root / "mountinfo"))


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / f"memory.{name}").write_text(text)


def test_version_2_takes_the_least_limit_on_the_way_up(tmp_path: Path) -> None:
    write(tmp_path / "a", max=f"{256 << 20}\n", current=f"{100 << 20}\n")
    write(tmp_path / "a/b", max="max\n", current="4096\n")
    finding = probe(tmp_path, "cgroup2", "0::/a/b\n")
    assert finding.status is Status.LIMITED
    assert "256 MiB, 100 MiB in use" in finding.detail
    assert str(tmp_path / "a/memory.max") in finding.mend


def test_version_1_limit(tmp_path: Path) -> None:
    write(tmp_path / "vm", limit_in_bytes=f"{1 << 30}\n", usage_in_bytes="0\n")
    write(tmp_path, limit_in_bytes=NO_LIMIT_V1, usage_in_bytes="0\n")
    finding = probe(tmp_path, "cgroup", "4:memory:/vm\n3:cpu:/vm\n0::/\n")
    assert finding.status is Status.LIMITED
    assert "limit of 1 GiB" in finding.detail


def test_in_a_container_the_root_stands_for_a_path_of_the_host(tmp_path: Path) -> None:
    write(tmp_path, max=f"{64 << 20}\n", current="0\n")
    finding = probe(tmp_path, "cgroup2", "0::/host/docker/0123\n")
    assert "64 MiB" in finding.detail


@pytest.mark.parametrize("line", ["4:memory:/vm\n", "0::/\n", ""])
def test_no_limit(tmp_path: Path, line: str) -> None:
    write(tmp_path / "vm", limit_in_bytes=NO_LIMIT_V1, usage_in_bytes="0\n")
    finding = probe(tmp_path, "cgroup", line)
    assert (finding.status, finding.detail) == (Status.OK, "no limit")


def test_without_proc_there_is_no_limit_to_see(tmp_path: Path) -> None:
    absent = str(tmp_path / "absent")
    assert cgroup.probe(absent, absent).status is Status.OK
