from __future__ import annotations

from pathlib import Path

import pytest

from guestfault.linux.hugetlb import Pool, pools


def test_pools_by_size(tmp_path: Path) -> None:
    for size, total in (("1048576kB", 1), ("2048kB", 8)):
        directory = tmp_path / f"hugepages-{size}"
        directory.mkdir()
        (directory / "nr_hugepages").write_text(f"{total}\n")
        (directory / "free_hugepages").write_text("3\n")
        (directory / "resv_hugepages").write_text("2\n")
    small, large = pools(tmp_path)
    assert small == Pool(2 << 20, total=8, free=3, reserved=2, overcommit=0, surplus=0)
    assert (large.page_size, large.total) == (1 << 30, 1)


def test_a_kernel_without_huge_pages(tmp_path: Path) -> None:
    assert pools(tmp_path / "absent") == ()


@pytest.mark.parametrize(
    ("free", "reserved", "overcommit", "surplus", "without", "with_"),
    [
        (0, 0, 0, 0, 0, 0),
        (2, 2, 0, 0, 0, 2),  # all that is free is promised
        (0, 0, 4, 1, 3, 3),
        (0, 3, 4, 4, 0, 0),
    ],
)
def test_what_a_fault_can_have(free, reserved, overcommit, surplus, without, with_) -> None:
    pool = Pool(2 << 20, 8, free, reserved, overcommit, surplus)
    assert pool.available() == without
    assert pool.available(with_reservation=True) == with_
