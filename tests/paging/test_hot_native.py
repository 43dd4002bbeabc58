"""What compiled code on disk is good for."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("numba", reason="numba is not installed: pip install 'guestfault[fast]'")

from guestfault.paging import hot_native

CALLER = """
from guestfault.paging.hot_native import compiled

@compiled
def one_more(n):
    return n + 1
"""


def load(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("caller", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def from_disk(path: Path) -> bool:
    """Import the module, call its function; whether its code was had from disk."""
    function: Any = load(path).one_more
    assert function(41) == 42
    hits = sum(function.stats.cache_hits.values())
    assert hits + sum(function.stats.cache_misses.values()) == 1
    return bool(hits)


def test_code_on_disk_is_good_until_any_file_behind_it_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "caller.py"
    path.write_text(CALLER)
    assert not from_disk(path)
    assert from_disk(path)
    monkeypatch.setattr(hot_native, "SOURCES", (("another.py", 0, 0),))
    assert not from_disk(path)
    assert from_disk(path)


def test_the_files_behind_it_have_the_words_and_the_kernel_s_numbers_among_them() -> None:
    names = {Path(name).name for name, _, _ in hot_native.SOURCES}
    assert {"hot_words.py", "hot_around.py", "around.py", "kvm.py", "userfaultfd.py"} <= names
