from __future__ import annotations

from pathlib import Path

from guestfault.linux.cgroup import Limit, hugetlb_limits, memory_limits


def group(root: Path, path: str, **files: str) -> Path:
    directory = root / path
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)
    return directory


def proc(root: Path, line: str, fstype: str, options: str) -> tuple[str, str]:
    (root / "mountinfo").write_text(f"1 1 0:1 / {root} rw - {fstype} {fstype} {options}\n")
    (root / "cgroup").write_text(line)
    return str(root / "cgroup"), str(root / "mountinfo")


def test_every_group_on_the_way_up_counts(tmp_path: Path) -> None:
    inner = group(tmp_path, "a/b", memory__max="8192\n", memory__current="4096\n")
    outer = group(tmp_path, "a", memory__max="16384\n", memory__current="16384\n")
    found = memory_limits(*proc(tmp_path, "0::/a/b\n", "cgroup2", "rw"))
    assert found == (
        Limit(8192, 4096, inner / "memory.max"),
        Limit(16384, 16384, outer / "memory.max"),
    )
    assert [limit.room for limit in found] == [4096, 0]


def test_a_group_past_its_limit_has_no_room() -> None:
    assert Limit(4096, 8192, Path("x")).room == 0


def test_huge_pages_are_limited_by_size(tmp_path: Path) -> None:
    directory = group(
        tmp_path,
        "vm",
        **{
            "hugetlb.2MB.limit_in_bytes": "4194304\n",
            "hugetlb.2MB.usage_in_bytes": "2097152\n",
            "hugetlb.1GB.limit_in_bytes": "9223372035781033984\n",  # none: what 1 GiB pages say
        },
    )
    where = proc(tmp_path, "5:hugetlb:/vm\n", "cgroup", "rw,hugetlb")
    file = directory / "hugetlb.2MB.limit_in_bytes"
    assert hugetlb_limits(2 << 20, *where) == (Limit(4 << 20, 2 << 20, file),)
    assert hugetlb_limits(1 << 30, *where) == ()


def test_huge_pages_in_version_2(tmp_path: Path) -> None:
    group(tmp_path, "vm", **{"hugetlb.1GB.max": "0\n", "hugetlb.1GB.current": "0\n"})
    where = proc(tmp_path, "0::/vm\n", "cgroup2", "rw")
    assert [limit.limit for limit in hugetlb_limits(1 << 30, *where)] == [0]
