"""A kernel that was built here, with private memory: it boots, and does what the table says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from guestfault.conform.case import matching
from guestfault.conform.compare import compare
from guestfault.conform.document import Column, Document, load
from guestfault.lab.errors import UnknownKernelError
from guestfault.lab.image import Kernel, open_kernel
from guestfault.lab.kernels import find_kernel
from guestfault.lab.machine import run

ROOT = Path(__file__).parents[2]
PRIVATE = ("private", "private-*", "shared-prot-none", "converted", "gmem-hwpoison", "hwpoison")


def asked(kernel: Kernel, *, npt: bool = True) -> Column:
    command = ["guestfault", "conform", "--on", "kvm", "--json", "--hostile", *PRIVATE]
    result = run(kernel, command, npt=npt)
    assert result.status == 0, result.stderr.decode()
    [column] = Document.from_json(result.stdout.decode()).columns
    return column


@pytest.mark.timeout(240)
def test_private_memory_is_as_the_table_says(protected_kernel: Kernel) -> None:
    kept = {c.name: c for c in load(str(ROOT / "docs/data/kernels.json")).columns}
    known = kept.get(f"lab:{protected_kernel.release}")
    if known is None:
        pytest.skip(f"the table has no {protected_kernel.release}")
    column = asked(protected_kernel)
    assert set(column.cases) == {case.name for case in matching(PRIVATE)} <= set(known.cases)
    assert not any(outcomes.skipped for outcomes in column.cases.values())
    assert compare(known, column) == []


@pytest.mark.timeout(240)
def test_shadow_paging_has_no_private_memory(protected_kernel: Kernel) -> None:
    column = asked(protected_kernel, npt=False)
    ran = {name.split("/")[0] for name, found in column.cases.items() if not found.skipped}
    assert ran == {"hwpoison", "gmem-hwpoison"}


@pytest.mark.timeout(300)
def test_its_causes_are_named_and_mended(protected_kernel: Kernel) -> None:
    """With two processors: a conversion is met while it is under way."""
    tests = ["private_causes", "guest_memfd_causes"]
    done = subprocess.run(
        [
            *(sys.executable, ROOT / "scripts" / "lab-tests.py"),
            *("--smp", "2", protected_kernel.release, "-q"),
            *(f"tests/fault/cause/test_{name}.py" for name in tests),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert "skipped" not in done.stdout


@pytest.mark.timeout(120)
def test_modules_of_a_directory_that_is_named(protected_kernel: Kernel) -> None:
    assert protected_kernel.modules is not None
    kernel = open_kernel(protected_kernel.image, protected_kernel.modules.parents[2])
    result = run(kernel, ["python3", "-c", "import os; print(os.uname().release)"])
    assert result.stdout.decode().split() == [protected_kernel.release]


@pytest.mark.timeout(120)
def test_kvm_built_in(protected_kernel: Kernel) -> None:
    """Modules are not asked for, and ``kvm_amd.npt`` on the command line reaches it."""
    try:
        kernel = find_kernel(f"{protected_kernel.release}-builtin")
    except UnknownKernelError:
        pytest.skip("the lab: no kernel built with scripts/sw-protected-kernel.sh --builtin")
    assert kernel.modules is None
    code = "print(open('/sys/module/kvm_amd/parameters/npt').read())"
    assert run(kernel, ["python3", "-c", code], npt=False).stdout.split() == [b"N"]
