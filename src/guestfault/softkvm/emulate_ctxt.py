"""An instruction that KVM carries out itself, and what it has asked userspace for on the way.

``struct x86_emulate_ctxt`` (``arch/x86/kvm/kvm_emulate.h``) and the ``mmio_*`` fields of
``struct kvm_vcpu``: data without behaviour, which is in :mod:`guestfault.softkvm.emulator`.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass, field

import iced_x86

from guestfault.softkvm.instruction_shape import PLAIN, Shape
from guestfault.softkvm.refusal import Emulate, GuestException
from guestfault.x86.memory_access import MemoryAccess

__all__ = ["EmulateCtxt", "MmioFragment", "X86Emul"]


class X86Emul(enum.Enum):
    """``X86EMUL_*``: how an emulated access, or a whole instruction, has ended."""

    CONTINUE = enum.auto()
    UNHANDLEABLE = enum.auto()  # KVM cannot do it
    PROPAGATE_FAULT = enum.auto()  # the guest gets an exception
    IO_NEEDED = enum.auto()  # userspace must say what is read


@dataclass(slots=True)
class MmioFragment:
    """``struct kvm_mmio_fragment``: the part of an access in one page that userspace must do.

    Its bytes are ``length`` of :attr:`EmulateCtxt.mmio_val`, from ``at`` on.
    """

    gpa: int
    at: int
    length: int


@dataclass(slots=True)
class EmulateCtxt:
    """What the emulator knows of the instruction that it is at, and of the exit it has prepared."""

    # The instruction, as it was fetched: kept while userspace is asked what it reads.
    fetched: bytes = b""
    insn: iced_x86.Instruction | None = None
    shape: Shape = PLAIN
    code_size: int = 64
    linear_rip: int = 0
    eip: int = 0
    tf: bool = False
    accesses: tuple[MemoryAccess, ...] | None = None  # of this round, once somebody has asked
    execute: Callable[[], X86Emul] | None = None  # what the processor cannot do
    # The fault that led here.  With nested paging its guest physical address is known; it is exact
    # for an access to a page table, and else that of the page behind ``fault_page``.
    fault: Emulate | None = None
    gpa_available: bool = False
    fault_page: int | None = None
    # How it is getting on.  ``mem_read`` is the read cache: an instruction that is carried out
    # again, because userspace has answered, does not read again what it has read before.
    mem_read: list[bytes] = field(default_factory=list)
    mem_read_pos: int = 0
    exception: GuestException | None = None
    rc: X86Emul = X86Emul.CONTINUE
    why: str = ""
    # The exit that is prepared: one access, in one or two fragments.  Those that are there may be
    # more than ``mmio_nr_fragments``: a later access, which needs no exit, resets that only.
    mmio_needed: bool = False
    mmio_is_write: bool = False
    mmio_read_completed: bool = False
    mmio_val: bytearray = field(default_factory=bytearray)
    mmio_fragments: list[MmioFragment] = field(default_factory=list)
    mmio_nr_fragments: int = 0
    mmio_cur_fragment: int = 0
    # String port I/O: what was read ahead, and the exit that is due.
    io_read: bytes = b""
    io_read_pos: int = 0
    pio_count: int = 0
    pio_is_in: bool = False
    # Registers that an instruction changes which the processor has not carried out.
    writeback: dict[str, int] = field(default_factory=dict)
