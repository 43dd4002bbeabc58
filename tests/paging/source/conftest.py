"""A file to read, how to read it, and how long that took."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest

from guestfault.paging.source.base import PageSource

SIZE = 37 * 4096 + 123  # no multiple of anything


@pytest.fixture(scope="session")
def content() -> bytes:
    return random.Random(6).randbytes(SIZE)


@pytest.fixture
def path(tmp_path: Path, content: bytes) -> Path:
    path = tmp_path / "memory"
    path.write_bytes(content)
    return path


@pytest.fixture(scope="session")
def read() -> Callable[[PageSource, int, int], bytes]:
    def read(source: PageSource, offset: int, length: int = 4096) -> bytes:
        buffer = bytearray(length)
        with memoryview(buffer) as view:
            source.read_into(offset, view)
        return bytes(buffer)

    return read
