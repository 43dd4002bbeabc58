"""What the processor may access when an event comes before, or in place of, an instruction.

An interrupt, an NMI or an exception reads a gate, perhaps a descriptor and the task state, and
pushes a frame.  Its accesses fail like an instruction's own, with RIP on an instruction that has
nothing to do with them.  Which event it was, the registers do not say, so nothing here is certain:
:func:`possible_deliveries` lists whatever any event could touch, a page being enough.
"""

from __future__ import annotations

from guestfault.x86.access_kind import AccessKind
from guestfault.x86.addressing import CodeContext
from guestfault.x86.memory_access import PAGE_SIZE, MemoryAccess, Role

__all__ = ["possible_deliveries"]

_READ, _WRITE = AccessKind.READ, AccessKind.WRITE
_VECTORS = 256
_FRAME_WORDS = 6  # SS, rSP, rFLAGS, CS, rIP and an error code


def possible_deliveries(context: CodeContext) -> list[MemoryAccess]:
    """The accesses of delivering some event now, all of them uncertain; empty without a usable IDT.

    Stacks that a task state segment names are listed only if it can be read.
    """
    state = context.state
    width = 16 if state.long_mode else 8 if state.protected else 4
    size = min(state.idt.limit + 1, _VECTORS * width)
    if size < width:
        return []
    vectors = Role.GATE if state.protected else Role.INTERRUPT_VECTOR
    listed = [context.system(state.idt.base, size, _READ, vectors, certain=False)]
    if not state.protected:
        return [*listed, context.stack(-6, 6, _WRITE, certain=False)]
    size = min(state.gdt.limit + 1, PAGE_SIZE)
    if size >= 8:
        listed.append(context.system(state.gdt.base, size, _READ, Role.DESCRIPTOR, certain=False))
    word = 8 if state.long_mode else 4
    size = _FRAME_WORDS * word
    if not state.cpl:
        top = state.gprs[4] & ~15 if state.long_mode else state.ss.base + state.gprs[4]
        listed.append(context.system(top - size, size, _WRITE, Role.STACK, certain=False))
    if state.tr.present and state.tr.limit >= 0x67:
        listed.append(context.system(state.tr.base, 0x68, _READ, Role.TSS, certain=False))
        # RSP0 and IST1 to IST7, or ESP0 of the 32-bit form.
        slots = (4, *range(0x24, 0x5C, 8)) if state.long_mode else (4,)
        for slot in slots:
            top_of_stack = context.load(state.tr.base + slot, word)
            if top_of_stack:
                where = (top_of_stack & ~15) - size
                listed.append(context.system(where, size, _WRITE, Role.STACK, certain=False))
    return listed
