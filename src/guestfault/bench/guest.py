"""The guest that is measured: it writes one word to each page of its share, and is done.

It is what kvm/selftests' ``demand_paging_test`` runs, so that the figures can stand beside those
that were published.  Everything but its code is the built-in guests' own
(:mod:`guestfault.guest.boot`): long mode at CPL 3, linear addresses that are not the physical ones.
"""

from __future__ import annotations

from guestfault.guest.assembler import Assembler
from guestfault.guest.boot import initial_memory
from guestfault.guest.layout import PAGE_SIZE, Layout, Mode
from guestfault.guest.program import DONE_PORT
from guestfault.guest.walk import Walk

__all__ = ["header", "layout_for"]


def layout_for(vcpus: int, pages: int) -> Layout:
    """A layout with exactly ``pages`` pages for each vCPU."""
    header_pages = 2
    while True:
        layout = Layout((header_pages + vcpus * pages) * PAGE_SIZE, Mode.LONG_CPL3, vcpus)
        if layout.header_pages == header_pages:
            return layout
        header_pages += 1


def header(layout: Layout) -> bytes:
    """The bytes before the data: the code, and the page tables."""
    code = _code(layout)
    memory = initial_memory(layout, Walk.SEQUENTIAL, 0)
    memory[: len(code)] = code
    return bytes(memory[: layout.header_pages * PAGE_SIZE])


def _code(layout: Layout) -> bytes:
    asm = Assembler(64)
    pointer, pages = asm.word("SI"), asm.dword("BP")
    again = asm.label()
    asm.store(pointer, pointer)
    asm.add(pointer, PAGE_SIZE)
    asm.dec(pages)
    asm.branch("JNE", again)
    end = asm.label()
    asm.out(DONE_PORT, bits=8)
    asm.branch("JMP", end)
    return asm.encode(layout.gva(layout.code * PAGE_SIZE))
