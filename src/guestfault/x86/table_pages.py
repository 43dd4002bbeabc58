"""Which pages of guest memory hold the page tables in use: everything reachable from CR3."""

from __future__ import annotations

from collections.abc import Iterator

from guestfault.x86.entries import ADDRESS_MASK, PT_PRESENT_MASK, PagingMode
from guestfault.x86.paging import ReadEntry
from guestfault.x86.paging_state import PagingState

__all__ = ["table_pages"]

_PAGE_MASK = ~0xFFF


def table_pages(state: PagingState, read_entry: ReadEntry) -> Iterator[int]:
    """The gpa of every page that a walk can read an entry from, each once, parents first.

    A page is given before its entries are read, so the caller can bring it in first.  An entry that
    ``read_entry`` cannot give (``None``) leads nowhere.
    """
    if state.mode is PagingMode.NONE:
        return
    root = state.root
    seen: set[int] = set()
    tables = [(root.level, root.gpa)]
    while tables:
        level, table = tables.pop()
        page = table & _PAGE_MASK
        if page in seen:
            continue
        seen.add(page)
        yield page
        if level == 1:
            continue
        leaf = state.formats[level].leaf
        size = state.entry_size
        # The four PDPTEs of PAE are not a page of their own.
        count = 4 if state.mode is PagingMode.PAE and level == 3 else state.mode.index_mask + 1
        for i in range(count):
            entry = read_entry(table + i * size, size)
            if entry is not None and entry & PT_PRESENT_MASK and not entry & leaf:
                tables.append((level - 1, entry & ADDRESS_MASK))
