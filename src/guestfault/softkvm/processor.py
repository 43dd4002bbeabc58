"""What KVM needs of a processor: the boundary between the code that is KVM and what executes.

Everything else in this room is written against :class:`Processor`.  The one that runs guests is
:class:`guestfault.softkvm.cpu.Cpu`; :mod:`guestfault.explore` has one that runs a script, so that
KVM's own code can be tried in every order of events without the cost of an engine.

A processor executes guest code until something needs KVM, and says what: a :class:`Stop`.  On each
TLB miss it asks for a page and is answered or refused (:class:`Hooks`).
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from guestfault.softkvm.vmcb import INTERCEPT_EXCEPTION
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import DB_VECTOR

__all__ = [
    "ABANDONED",
    "GPRS",
    "MAX_PHYS",
    "PRIVATE_PAGE",
    "REFUSED",
    "REQUESTED",
    "STEPPED",
    "TRAP",
    "Access",
    "EmulatedMemory",
    "Hooks",
    "MakeProcessor",
    "Processor",
    "Stop",
    "StopKind",
]

MAX_PHYS = 1 << 46
"""Guest physical addresses lie below this."""
PRIVATE_PAGE = 1 << 48
"""Added to a guest physical address: the private page, where a frame has a shared one, too."""
GPRS = (
    *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
    *(f"r{i}" for i in range(8, 16)),
    *("rip", "rflags"),
)
"""The general registers, in the order of ``struct kvm_regs``."""


class Access(enum.IntEnum):
    """Why the TLB is asked; the numbers are Unicorn's (``uc_mem_type``)."""

    READ = 16
    WRITE = 17
    FETCH = 18


class StopKind(enum.Enum):
    """What :meth:`Processor.run`, ``step`` and ``emulate`` came back for."""

    REFUSED = enum.auto()  # the TLB miss was refused
    INTERCEPT = enum.auto()  # a #VMEXIT; Stop.code is its number
    PLANTED = enum.auto()  # an instruction that KVM must perform is next
    REQUESTED = enum.auto()  # stop() was called
    STEPPED = enum.auto()  # the one instruction has completed
    ABANDONED = enum.auto()  # an emulated instruction was refused an access
    LOST = enum.auto()  # the engine gave up for a reason it did not give; Stop.text is its error


@dataclass(frozen=True, slots=True)
class Stop:
    """Why the processor stopped.  RIP is on the instruction that has not completed."""

    kind: StopKind
    code: int = 0
    text: str = ""


REFUSED = Stop(StopKind.REFUSED)
REQUESTED = Stop(StopKind.REQUESTED)
STEPPED = Stop(StopKind.STEPPED)
ABANDONED = Stop(StopKind.ABANDONED)
TRAP = Stop(StopKind.INTERCEPT, INTERCEPT_EXCEPTION + DB_VECTOR)


class Hooks(NamedTuple):
    """What a processor asks, on the thread that runs it and in the midst of an instruction.

    ``tlb_fill(gva, access)`` gives a physical page and rights (``UC_PROT_*``), or ``None`` to
    refuse.  ``fetch(linear, size)`` reads code bytes that were executed before, or gives ``None``
    if they are not there any more.
    """

    tlb_fill: Callable[[int, int], tuple[int, int] | None]
    fetch: Callable[[int, int], bytes | None]


class EmulatedMemory(Protocol):
    """What an emulated instruction has for memory.  Addresses are linear.

    Each operand comes once and whole, though it may lie in two pages.  After a refusal nothing more
    is asked: the instruction is abandoned.
    """

    def read(self, linear: int, size: int) -> bytes | None:
        """The bytes there; ``None`` to refuse."""

    def write(self, linear: int, data: bytes) -> bool:
        """Write them; ``False`` to refuse."""


class Processor(Protocol):
    """One processor.  All methods but :meth:`stop` belong to the thread that runs it."""

    efer: int
    msrs: dict[str, int]
    rip: int

    def run(self) -> Stop:
        """Execute until something stops it."""

    def step(self) -> Stop:
        """Execute one instruction, or one round of a repeated one: STEPPED if it has completed.

        TRAP stands for the same, where the guest itself traces the instruction.
        """

    def stop(self) -> None:
        """From any thread: make :meth:`run` come back soon.  Lost if it has not begun yet."""

    def load(self, sregs: uapi.kvm_sregs) -> None:
        """Take these system registers; the others stay as they are."""

    def read_system(self, sregs: uapi.kvm_sregs) -> None:
        """Bring ``sregs`` up to date with what the guest has changed without an intercept."""

    def named_gprs(self) -> dict[str, int]:
        """The general registers, RIP and RFLAGS."""

    def write_gprs(self, values: dict[str, int]) -> None:
        """Write some of them, by name."""

    def get(self, name: str) -> int:
        """One of them."""

    def set(self, name: str, value: int) -> None:
        """Write one of them."""

    def read_cs(self) -> int:
        """CS as the guest would read it; its low bits are the privilege level."""

    def read_rflags(self) -> int:
        """RFLAGS."""

    def set_cr2(self, value: int) -> None:
        """Write CR2."""

    def segment_base(self, name: str) -> int:
        """The base that a segment adds to an address."""

    @property
    def linear_rip(self) -> int:
        """CS base + RIP."""

    def code_size(self) -> int:
        """16, 32 or 64: how the bytes at CS:RIP are to be decoded."""

    def skip(self, length: int) -> None:
        """Step over an instruction that has been emulated."""

    def unplant(self) -> None:
        """What is at RIP is not an instruction to stop on: let it run."""

    def emulate(self, linear: int, code: bytes, operand: int, memory: EmulatedMemory) -> Stop:
        """Execute one instruction with ``memory`` for all its data, outside guest mode.

        ``code`` is the instruction, whole; it is at ``linear``, where RIP is, and is not looked for
        in the guest's memory.  ``operand`` is the size of its memory operand, 0 if it has none.
        STEPPED or TRAP: it has completed, or one round of it if it is repeated.  After any other
        stop the registers are as before; what was written to ``memory`` is written.
        """

    def map_ram(self, gpa: int, size: int, hva: int) -> None:
        """Put host memory at a guest physical address.  Rights are the TLB's business."""

    def unmap_ram(self, gpa: int, size: int) -> None:
        """Take it away again."""

    def flush_tlb(self) -> None:
        """Forget every translation; the next access of each page asks again."""

    def flush_code(self) -> None:
        """Forget translated code, because the bytes under it may have changed."""

    def close(self) -> None:
        """Free what it holds."""


MakeProcessor = Callable[[Hooks], Processor]
