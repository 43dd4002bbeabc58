from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tests.lab.conftest import RELEASE, module

from guestfault.lab.elf import interpreter, is_elf, modinfo, without_symbols

PYTHON = Path(sys.executable).resolve()


def test_this_python_names_its_loader() -> None:
    loader = interpreter(PYTHON.read_bytes())
    if loader is None:
        pytest.skip("this Python is a static program")
    assert Path(loader).exists()


def test_a_program_without_its_symbols_is_smaller_and_runs(tmp_path: Path) -> None:
    data = PYTHON.read_bytes()
    copy = tmp_path / "python"
    copy.write_bytes(without_symbols(data))
    copy.chmod(0o755)
    assert copy.stat().st_size <= len(data)
    done = subprocess.run([copy, "-c", "print(6 * 7)"], capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"


def test_what_a_module_says() -> None:
    said = modinfo(module(depends="kvm,ccp"))
    assert said["depends"] == "kvm,ccp"
    assert said["vermagic"].split()[0] == RELEASE


# A table of sections further away than any file reaches.
@example(b"\x00\x80" + bytes(13) + b"\x01" + bytes(2), 46)
@given(st.binary(max_size=300), st.integers(0, 300))
def test_any_bytes_are_read_without_an_exception(tail: bytes, cut: int) -> None:
    for data in (tail, b"\x7fELF\x02\x01" + tail, module()[:cut] + tail):
        modinfo(data)
        interpreter(data)
        if not is_elf(data):
            assert without_symbols(data) == data
        else:
            without_symbols(data)
