"""RAM of 16 pages, the three ways in which its pages can be absent, and a source that counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import pytest

from guestfault.errors import Unavailable
from guestfault.linux.pagemap import Pagemap
from guestfault.memory.ram import PAGE_SIZE, GuestRam
from guestfault.memory.view import GuestView, Protected, Registered, Unpopulated
from guestfault.paging.source.base import SourceError

PAGES = 16


class CountingSource:
    """Page n is all of the byte n + 1.  Counts reads by page; fails for those in ``broken``."""

    def __init__(self, pages: int = PAGES) -> None:
        self.size = pages * PAGE_SIZE
        self.reads: Counter[int] = Counter()
        self.broken: set[int] = set()

    def read_into(self, offset: int, buffer: memoryview) -> None:
        for at in range(0, len(buffer), PAGE_SIZE):
            page = (offset + at) // PAGE_SIZE
            self.reads[page] += 1
            if page in self.broken:
                half = PAGE_SIZE // 2
                buffer[at : at + half] = b"\xee" * half
                raise SourceError(offset, len(buffer), "gone")
            buffer[at : at + PAGE_SIZE] = bytes([page + 1]) * PAGE_SIZE


@pytest.fixture
def source() -> CountingSource:
    return CountingSource()


@pytest.fixture
def ram() -> Iterator[GuestRam]:
    with GuestRam(PAGES * PAGE_SIZE) as ram:
        yield ram


@pytest.fixture(params=["unpopulated", "failing", "waiting", "protected"])
def view(request: pytest.FixtureRequest, ram: GuestRam) -> Iterator[GuestView]:
    view: GuestView
    try:
        match request.param:
            case "unpopulated":
                view = Unpopulated(ram)
            case "protected":
                view = Protected(ram)
            case how:
                view = Registered(ram, sigbus=how == "failing")
    except Unavailable as error:
        pytest.skip(str(error))
    yield view
    view.close()


@pytest.fixture
def pagemap() -> Iterator[Pagemap]:
    with Pagemap() as pagemap:
        yield pagemap
