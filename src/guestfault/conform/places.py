"""Where things lie in the memory of a conformance guest.

Guest physical memory, all below 64 KiB so that real mode reaches it with flat segments::

    0x0000  the interrupt vectors of real mode
    0x1000  the GDT        0x2000  the TSS        0x3000  the IDT of long mode
    0x4000  the code       0x5000  a stub for each exception
    0x6000  scratch        0x7000  the stack, which grows down from 0x8000
    0x8000  *the target*, four pages: what a case is about is the second, its neighbours are sound
    0xc000  a device: no slot
    0xd000  the page tables of long mode

Header and tables are in slots of their own, always present.  The target has its own slot and its
own memory, which the condition of the case prepares.

In long mode a linear address is the physical one plus :data:`GVA_OFFSET`: whoever takes one for the
other fails at once.
"""

from __future__ import annotations

from typing import Final

PAGE: Final = 4096
GVA_OFFSET: Final = 1 << 32

VECTORS: Final = 0x0000
GDT: Final = 0x1000
TSS: Final = 0x2000
IDT: Final = 0x3000
CODE: Final = 0x4000
STUBS: Final = 0x5000
SCRATCH: Final = 0x6000
STACK: Final = 0x8000
HEADER_END: Final = 0x8000

TARGET: Final = 0x8000
TARGET_SIZE: Final = 4 * PAGE
THE_PAGE: Final = TARGET + PAGE  # the one that the case is about
OPERAND: Final = THE_PAGE + 0x120  # within it

DEVICE: Final = 0xC000
TABLES: Final = 0xD000
TABLES_END: Final = 0x1_4000

WALKED: Final = GVA_OFFSET + (1 << 30)  # a linear address whose page table may be the target

READY_PORT: Final = 0x10
DONE_PORT: Final = 0x11
STRING_PORT: Final = 0x12
EXCEPTION_PORT: Final = 0x13
PORTS: Final = 0x20  # how many the TSS lets CPL 3 use
STUB_SIZE: Final = 16

CONTENT: Final = 0x11223344  # what the operand holds
SCRATCHED: Final = 0x01020304  # what scratch holds
MARK: Final = 0x0BADCAFE  # what lies elsewhere in the page, and must survive
MARKED: Final = THE_PAGE + 0x800
STORED: Final = 0x55667788  # what the guest writes
ANSWER: Final = 0x5A  # each byte of what the VMM answers to a read of a device
