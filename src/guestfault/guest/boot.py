"""What a built-in guest starts from: its memory, and the registers of each vCPU.

A vCPU starts in its final mode, with the hidden parts of its segment registers set, so the guest
needs no descriptor table and no interrupt table: an exception is a triple fault, which the VMM sees
at once as ``KVM_EXIT_SHUTDOWN``.

At CPL 3 a guest may write to ports for either of two reasons, IOPL 3 or a TSS whose bitmap says so,
and it has both.  IOPL is enough for a processor.  KVM as a PVM guest runs CPL 3 on the real one,
whose IOPL is not the guest's, and asks the TSS.  The TSS lies at the end of the code page, which is
present if an instruction could be fetched: KVM answers an absent TSS with #GP, not with an exit.
"""

from __future__ import annotations

import random
from dataclasses import asdict, replace
from typing import Final

from guestfault.guest.layout import PAGE_SIZE, Layout
from guestfault.guest.program import DONE_PORT, assemble
from guestfault.guest.vcpu_state import VcpuState
from guestfault.guest.walk import Walk, initial_hash
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import CR0_ET, X86_EFLAGS_FIXED, X86_EFLAGS_IOPL
from guestfault.x86.segments import Segments
from guestfault.x86.tables import PagingMode, TableBuilder

__all__ = ["entry_state", "initial_memory"]

_CHUNK: Final = 1 << 20
_APIC_BASE: Final = 0xFEE0_0000 | 1 << 11  # where a PC's local APIC is at reset, enabled
_APIC_BASE_BSP: Final = 1 << 8

# A 64-bit TSS of zeros but for the offset of its bitmap, one bit per port; the byte of ones at the
# end is the architecture's (SDM vol. 1, "I/O Permission Bit Map").
_BITMAP: Final = bytes(DONE_PORT // 8 + 1) + b"\xff"
_TSS: Final = bytes(102) + (104).to_bytes(2, "little") + _BITMAP
_TSS_OFFSET: Final = PAGE_SIZE - 128  # in the code page


def initial_memory(layout: Layout, walk: Walk, seed: int) -> bytearray:
    """All of the guest's memory: code, page tables, and data pages of pseudo-random bytes."""
    memory = bytearray(layout.memory_size)
    code = assemble(layout, walk)
    at = layout.code * PAGE_SIZE
    memory[at : at + len(code)] = code
    if layout.mode.is_long:
        memory[_tss(layout) : _tss(layout) + len(_TSS)] = _TSS
        tables = _tables(layout)
        tables.map(layout.mapping)
        image = tables.image()
        memory[tables.first_table : tables.first_table + len(image)] = image
    randbytes = random.Random(seed).randbytes
    for at in range(layout.header_pages * PAGE_SIZE, layout.memory_size, _CHUNK):
        end = min(at + _CHUNK, layout.memory_size)
        memory[at:end] = randbytes(end - at)
    return memory


def entry_state(layout: Layout, vcpu: int) -> VcpuState:
    """The registers with which vCPU ``vcpu`` begins, for any walk."""
    regs, sregs = uapi.kvm_regs(), uapi.kvm_sregs()
    mode, share = layout.mode, layout.share(vcpu)
    regs.rip = layout.gva(layout.code * PAGE_SIZE)
    regs.rflags = X86_EFLAGS_FIXED | (X86_EFLAGS_IOPL if mode.cpl == 3 else 0)
    regs.rsi = layout.gva(share.start * PAGE_SIZE)
    regs.rbp = len(share)
    regs.rbx = initial_hash(vcpu, 8 * mode.word_size)
    if mode.is_long:
        segments = Segments.long_mode(mode.cpl)
        task = replace(segments.tr, base=layout.gva(_tss(layout)), limit=len(_TSS) - 1)
        segments = replace(segments, tr=task)
        paging = _tables(layout).state
        sregs.cr0, sregs.cr3, sregs.cr4 = paging.cr0, paging.cr3, paging.cr4
        sregs.efer = paging.efer
    else:
        segments = Segments.big_real_mode()
        sregs.cr0 = CR0_ET
    for name, fields in asdict(segments).items():
        setattr(sregs, name, uapi.kvm_segment(**fields))
    sregs.apic_base = _APIC_BASE | (_APIC_BASE_BSP if vcpu == 0 else 0)
    return VcpuState(regs, sregs)


def _tss(layout: Layout) -> int:
    """The TSS's gpa."""
    return layout.code * PAGE_SIZE + _TSS_OFFSET


def _tables(layout: Layout) -> TableBuilder:
    """The tables while they are still empty."""
    return TableBuilder(PagingMode.FOUR_LEVEL, first_table=layout.tables.start * PAGE_SIZE)
