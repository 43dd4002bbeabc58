"""What the tests of conform share."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest


@pytest.fixture
def resources() -> Callable[[], dict[str, int]]:
    """How many descriptors, mappings and threads this process has."""

    def count() -> dict[str, int]:
        with open("/proc/self/maps") as maps:
            mappings = sum(1 for _ in maps)
        return {
            "descriptors": len(os.listdir("/proc/self/fd")),
            "mappings": mappings,
            "threads": len(os.listdir("/proc/self/task")),
        }

    return count
