from __future__ import annotations

import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from tests.lab.conftest import entries

import guestfault
from guestfault.errors import Unavailable
from guestfault.lab.layers import (
    DEPENDENCIES,
    PYTHON,
    libraries,
    numba_layer,
    package_layer,
    python_layer,
)


@pytest.mark.timeout(120)
def test_python_comes_whole_and_is_kept(empty_store: Path) -> None:
    layer = python_layer()
    found = entries(layer)
    mode, target = found[PYTHON]
    assert stat.S_ISLNK(mode)
    assert found[target.decode()][0] == stat.S_IFREG | 0o755
    names = {os.path.basename(path) for path in found}
    assert {"os.pyc", "ctypes", "unicorn", "iced_x86", "libc.so.6"} <= names
    assert not {"tkinter", "test", "idlelib", "libtk8.6.so"} & names
    kept = list((empty_store / "layers").glob("python-*"))
    assert len(kept) == 1
    before = kept[0].stat().st_mtime_ns
    assert python_layer() == layer
    assert kept[0].stat().st_mtime_ns == before


@pytest.mark.timeout(120)
@pytest.mark.skipif(shutil.which("unshare") is None or os.geteuid() != 0, reason="needs chroot")
def test_python_runs_from_its_layer_alone(empty_store: Path, tmp_path: Path) -> None:
    root = tmp_path / "root"
    for path, (mode, data) in (entries(python_layer()) | entries(package_layer())).items():
        where = root / path.lstrip("/")
        if stat.S_ISDIR(mode):
            where.mkdir(parents=True, exist_ok=True)
        elif stat.S_ISLNK(mode):
            where.symlink_to(data.decode())
        else:
            where.write_bytes(data)
            where.chmod(mode & 0o777)
    done = subprocess.run(
        ["/usr/bin/guestfault", "--version"],
        env={"PYTHONPATH": "/lab/package:/lab/dependencies"},
        preexec_fn=lambda: os.chroot(root),
        cwd="/",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.strip() == f"guestfault {guestfault.__version__}", done.stderr


@pytest.mark.timeout(120)
def test_numba_comes_with_its_libraries_where_it_looks_for_them(empty_store: Path) -> None:
    pytest.importorskip("numba")
    layer = numba_layer()
    found = entries(layer)
    assert found[f"{DEPENDENCIES}/llvmlite/binding/libllvmlite.so"][0] == stat.S_IFREG | 0o755
    assert {f"{DEPENDENCIES}/{name}/__init__.pyc" for name in ("numba", "numpy")} <= set(found)
    # What a wheel brings lies where the wheel's own paths lead, and nowhere else.
    names = [os.path.basename(path) for path in found if ".libs/" in path]
    assert len(names) == len(set(names))
    assert not [path for path in found if "site-packages" in path or "/tests/" in path]
    assert numba_layer() == layer
    shutil.rmtree(empty_store)  # 200 MB


def test_no_numba_to_take_along(empty_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(Unavailable, match=r"numba is not installed.*guestfault\[fast\]"):
        numba_layer()


def test_the_package_comes_with_bytecode_that_is_believed(empty_store: Path) -> None:
    found = entries(package_layer())
    source = "/lab/package/guestfault/errors.py"
    assert found[source][1] == Path(guestfault.__file__).with_name("errors.py").read_bytes()
    tag = sys.implementation.cache_tag
    _, bytecode = found[f"/lab/package/guestfault/__pycache__/errors.{tag}.pyc"]
    assert bytecode[4:8] == b"\1\0\0\0"


def test_a_damaged_kept_layer_is_made_again(empty_store: Path) -> None:
    layer = package_layer()
    (kept,) = (empty_store / "layers").glob("guestfault-*")
    kept.write_bytes(b"\xff" * 20)
    assert package_layer() == layer


def test_a_static_file_needs_no_library(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("x")
    assert libraries(tmp_path / "text") == []


def test_a_program_needs_its_loader_and_its_c_library() -> None:
    python = Path(sys.executable).resolve()
    found = libraries(python)
    if not found:
        pytest.skip("this Python is a static program")
    assert all(path.exists() for path in found)
    assert any(path.name.startswith(("libc.", "ld-musl")) for path in found)


def test_a_library_that_is_not_here_is_named(tmp_path: Path) -> None:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler, to make a program that lacks a library")
    (tmp_path / "f.c").write_text("int f(void) { return 0; }")
    (tmp_path / "m.c").write_text("int f(void); int main(void) { return f(); }")
    library, program = tmp_path / "libgone.so", tmp_path / "program"
    subprocess.run([compiler, "-shared", "-o", library, tmp_path / "f.c"], check=True)
    subprocess.run([compiler, "-o", program, tmp_path / "m.c", library], check=True)
    library.unlink()
    with pytest.raises(Unavailable, match=r"libgone\.so, not found|libgone\.so"):
        libraries(program)
