from __future__ import annotations

from pathlib import Path

from guestfault.linux.mounts import mount_points

MOUNTINFO = """\
22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
23 22 0:5 / /proc rw - proc proc rw
30 22 0:30 / /sys/fs/cgroup/cpu rw shared:9 master:2 - cgroup cgroup rw,cpu,cpuacct
31 22 0:31 / /sys/fs/cgroup/mem\\040ory rw - cgroup cgroup rw,memory
32 22 0:32 / /one rw - tracefs none rw
33 22 0:32 / /two rw - tracefs none rw
"""


def test_mounts_are_found_by_type_option_and_with_odd_names(tmp_path: Path) -> None:
    file = tmp_path / "mountinfo"
    file.write_text(MOUNTINFO)
    found = mount_points("tracefs", mountinfo=str(file))
    assert found == (Path("/one"), Path("/two"))
    found = mount_points("cgroup", "memory", mountinfo=str(file))
    assert found == (Path("/sys/fs/cgroup/mem ory"),)
    assert mount_points("cgroup", "pids", mountinfo=str(file)) == ()


def test_this_process_has_a_proc() -> None:
    assert Path("/proc") in mount_points("proc")


def test_without_proc_nothing_is_known(tmp_path: Path) -> None:
    assert mount_points("proc", mountinfo=str(tmp_path / "absent")) == ()
