from __future__ import annotations

import json
import shutil
import stat
from pathlib import Path

import pytest
from tests.lab.conftest import entries

from guestfault.lab.errors import StorageError
from guestfault.lab.initramfs import Job, initramfs
from guestfault.lab.modules import Module


def test_a_run_adds_its_modules_its_job_and_its_files(tmp_path: Path) -> None:
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    (tree / "sub" / "data").write_bytes(b"data")
    modules = [Module("irqbypass", b"1"), Module("kvm", b"2")]
    job = Job(["guestfault", "check"], ["/out"], {"A": "b"}, {"/t": tree})
    found = entries(initramfs(modules, job)[-1])
    loaded = sorted(path for path in found if path.startswith("/lab/modules/"))
    assert loaded == ["/lab/modules/00-irqbypass.ko", "/lab/modules/01-kvm.ko"]
    assert found["/t/sub/data"][1] == b"data"
    assert stat.S_ISCHR(found["/dev/console"][0])
    document = json.loads(found["/lab/job.json"][1])
    assert document["command"] == ["guestfault", "check"]
    assert document["environment"]["A"] == "b"


def test_a_program_brings_its_libraries() -> None:
    program = shutil.which("cat")
    if program is None:
        pytest.skip("no cat here")
    found = entries(initramfs([], Job(["cat"], added={"/usr/bin/cat": Path(program)}))[-1])
    assert found["/usr/bin/cat"][0] == stat.S_IFREG | 0o755
    assert any(".so" in path for path in found)


def test_what_is_to_be_added_and_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="No such file"):
        initramfs([], Job(["x"], added={"/x": tmp_path / "none"}))
