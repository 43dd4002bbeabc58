from __future__ import annotations

from pathlib import Path

import pytest

from guestfault.check.finding import Finding, Status
from guestfault.check.shared_memory import probe


def machine(mm: Path, shmem_enabled: str, pools: dict[str, tuple[int, int]]) -> Path:
    (mm / "transparent_hugepage").mkdir(parents=True)
    (mm / "transparent_hugepage/shmem_enabled").write_text(shmem_enabled)
    for size, (total, free) in pools.items():
        pool = mm / "hugepages" / f"hugepages-{size}"
        pool.mkdir(parents=True)
        (pool / "nr_hugepages").write_text(f"{total}\n")
        (pool / "free_hugepages").write_text(f"{free}\n")
    return mm


def by_name(shm: str, mm: Path) -> dict[str, Finding]:
    return {finding.name: finding for finding in probe(shm, str(mm))}


def test_this_machine_has_answers() -> None:
    assert [finding.name for finding in probe()] == ["/dev/shm", "shmem_enabled", "hugetlb pools"]


def test_a_missing_shm_is_named(tmp_path: Path) -> None:
    shm = str(tmp_path / "shm")
    finding = by_name(shm, tmp_path)[shm]
    assert finding.status is Status.MISSING
    assert shm in finding.mend


@pytest.mark.parametrize(
    ("setting", "status"),
    [
        ("always within_size advise [never] deny force\n", Status.LIMITED),
        ("always within_size [advise] never deny force\n", Status.OK),
        ("always within_size advise never deny [force]\n", Status.LIMITED),
    ],
)
def test_shmem_enabled_is_the_word_in_brackets(
    tmp_path: Path, setting: str, status: Status
) -> None:
    finding = by_name("/", machine(tmp_path, setting, {}))["shmem_enabled"]
    assert finding.status is status
    assert finding.detail.split(":")[0] in ("never", "advise", "force")


def test_hugetlb_pools_are_told_apart(tmp_path: Path) -> None:
    mm = machine(tmp_path, "", {"1048576kB": (0, 0), "2048kB": (8, 3)})
    finding = by_name("/", mm)["hugetlb pools"]
    assert (finding.status, finding.detail) == (Status.OK, "2 MiB: 3 of 8 free; 1 GiB: empty")


def test_hugetlb_pools_without_a_free_page_are_no_use(tmp_path: Path) -> None:
    finding = by_name("/", machine(tmp_path, "", {"2048kB": (8, 0)}))["hugetlb pools"]
    assert finding.status is Status.LIMITED


def test_a_kernel_without_huge_pages(tmp_path: Path) -> None:
    found = by_name("/", tmp_path)
    assert found["shmem_enabled"].status is Status.MISSING
    assert found["hugetlb pools"].status is Status.MISSING
