"""A snapshot for the commands that take one."""

from __future__ import annotations

import pytest

from guestfault.guest.layout import Mode
from guestfault.guest.snapshot import Snapshot, build
from guestfault.guest.walk import Walk


@pytest.fixture(scope="module")
def taken(tmp_path_factory: pytest.TempPathFactory) -> Snapshot:
    path = tmp_path_factory.mktemp("snapshot") / "guest"
    return build(path, 1 << 20, Mode.LONG_CPL3, Walk.RANDOM, vcpus=2)
