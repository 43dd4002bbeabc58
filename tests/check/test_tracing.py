from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from guestfault.check import tracing
from guestfault.check.finding import Finding, Status
from guestfault.linux.procfs import sysctl


def probe(root: Path, mounted: bool = True) -> dict[str, Finding]:
    mountinfo = root / "mountinfo"
    mountinfo.write_text(f"1 1 0:1 / {root} rw - tracefs none rw\n" if mounted else "")
    filesystems = root / "filesystems"
    filesystems.write_text("nodev\ttracefs\n\text4\n")
    return {f.name: f for f in tracing.probe(str(mountinfo), str(filesystems))}


def register(root: Path, event: str) -> None:
    directory = root / "events" / event
    directory.mkdir(parents=True)
    name, field = event.split("/")[1], "field:u64 addr;\toffset:8;\tsize:8;\tsigned:0;"
    # A number that no tracepoint has.
    (directory / "format").write_text(f"name: {name}\nID: 65534\nformat:\n\t{field}\n")


def test_this_machine_has_an_answer() -> None:
    found = tracing.probe()
    assert found[0].name == "tracefs"
    assert found[-1].name == "perf records"


def test_events_are_told_apart(tmp_path: Path) -> None:
    register(tmp_path, "kvm/kvm_page_fault")
    found = probe(tmp_path)
    assert found["tracefs"].detail == f"at {tmp_path}"
    assert found["kvm:kvm_page_fault"].status is Status.OK
    # Its group is there without it, or not there at all: the mends differ.
    assert found["kvm:kvm_userspace_exit"].status is Status.MISSING
    assert "no such event" in found["kvm:kvm_userspace_exit"].detail
    assert "load the module" in found["kvmmmu:kvm_mmu_pagetable_walk"].mend


@pytest.mark.skipif(os.geteuid() != 0, reason="not root")
def test_an_event_is_really_opened(tmp_path: Path) -> None:
    register(tmp_path, "kvm/kvm_page_fault")
    perf = probe(tmp_path)["perf records"]
    assert perf.status is Status.MISSING
    assert "perf_event_open" in perf.detail


def test_without_tracefs_the_mend_is_to_mount_it(tmp_path: Path) -> None:
    found = probe(tmp_path, mounted=False)
    assert found.keys() == {"tracefs", "perf records"}
    assert found["tracefs"].status is Status.MISSING
    assert found["tracefs"].mend.startswith("mount -t tracefs")


def test_a_kernel_without_tracefs_cannot_mount_it(tmp_path: Path) -> None:
    mountinfo = tmp_path / "mountinfo"
    mountinfo.touch()
    tracefs = tracing.probe(str(mountinfo), str(mountinfo))[0]
    assert "CONFIG_TRACING" in tracefs.mend


def test_a_tracefs_that_is_closed_to_this_user(tmp_path: Path) -> None:
    tracefs = probe(tmp_path)["tracefs"]  # no events directory to look into
    assert tracefs.status is Status.MISSING
    assert "closed to this user" in tracefs.detail


@pytest.mark.skipif(
    int(sysctl("kernel.perf_event_paranoid") or -1) <= -1, reason="perf is open to everyone here"
)
def test_records_take_a_capability(as_nobody: Callable[[Callable[[], Any]], Any]) -> None:
    perf: Finding = as_nobody(lambda: tracing.probe()[-1])
    assert perf.status is Status.MISSING
    assert "CAP_PERFMON" in perf.mend
    assert "perf_event_paranoid=-1" in perf.mend


@pytest.mark.skipif(os.geteuid() != 0, reason="not root")
def test_root_may_read_records() -> None:
    perf = tracing.probe()[-1]
    if "CAP" not in perf.detail:
        pytest.skip("root without CAP_PERFMON and CAP_SYS_ADMIN")
    assert perf.status is Status.OK
