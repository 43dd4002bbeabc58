from __future__ import annotations

import errno
from collections.abc import Iterator
from typing import Any

import pytest

from guestfault.linux import vma_rights
from guestfault.linux.mapping import Mapping
from guestfault.linux.vma_rights import VmaRightsReader
from guestfault.uapi.mman import PROT_NONE, PROT_READ

PAGE = 4096


@pytest.fixture(params=["PROCMAP_QUERY", "maps"])
def reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if request.param == "maps":  # a kernel before 6.11
        monkeypatch.setattr(vma_rights, "ioctl", lambda *_: -errno.ENOTTY)
    reader = VmaRightsReader()
    yield reader
    reader.close()
    reader.close()


def test_rights_and_extent(reader: VmaRightsReader) -> None:
    with Mapping.anonymous(3 * PAGE) as mapping:
        mapping.protect(PAGE, PAGE, PROT_READ)
        mapping.protect(2 * PAGE, PAGE, PROT_NONE)
        first, second, third = (reader.at(mapping.address + n * PAGE + 5) for n in range(3))
        assert first is not None
        assert (first.end, first.read, first.write) == (mapping.address + PAGE, True, True)
        assert second == (mapping.address + PAGE, mapping.address + 2 * PAGE, True, False)
        assert third is not None
        assert (third.start, third.read, third.write) == (mapping.address + 2 * PAGE, False, False)
    assert reader.at(mapping.address) is None
