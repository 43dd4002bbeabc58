"""Instructions that access a device: performed by KVM, answered by userspace.

The kernel decodes such an instruction and carries it out itself.  We let the processor carry it out,
one single step with a *device window* where the missing memory would be, and watch:

- A read that userspace has not answered yet abandons the step: the registers go back to where they
  were, and KVM_EXIT_MMIO asks for the data.  The next KVM_RUN repeats the step with the answer.  RIP
  is still on the instruction when userspace sees the exit.
- Writes are collected while the instruction completes, and handed to userspace afterwards, at most
  eight bytes at a time (KVM calls them fragments).  RIP is past the instruction by then.
"""

from __future__ import annotations

from guestfault.softkvm.cpu import StopKind
from guestfault.softkvm.internal_error import internal_error
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.refusal import AccessFailed, Emulate
from guestfault.uapi import kvm as uapi

__all__ = ["DeviceAccesses", "emulate_device_access"]

_PAGE_MASK = 0xFFF
_MAX_FRAGMENT = 8


class DeviceAccesses:
    """What one instruction does to devices, seen access by access.

    Unicorn hands an access of eight bytes, or an unaligned one, to the window in pieces; its memory
    hooks, called just before, say what the access was.
    """

    def __init__(self) -> None:
        self.rip = -1
        self.answers: list[bytes] = []
        self.begin(-1)

    def begin(self, rip: int) -> None:
        """Before a step; the answers so far belong to the instruction at ``rip``."""
        if rip != self.rip:
            self.rip, self.answers = rip, []
        self.unanswered: tuple[int, int] | None = None
        self.writes: list[tuple[int, bytes]] = []
        self._address, self._size = 0, 0
        self._is_new = False
        self._reads = 0
        self._data, self._data_gpa = b"", 0

    def on_access(self, address: int, size: int) -> None:
        """An access of the instruction begins."""
        if self._address <= address and address + size <= self._address + self._size:
            return  # a part of the one that has begun
        self._address, self._size, self._is_new = address, size, True

    def _extent(self, gpa: int, size: int) -> tuple[int, int]:
        """The access to which a piece belongs, as far as it lies in the piece's page."""
        start = gpa & ~_PAGE_MASK | self._address & _PAGE_MASK
        if not start - _MAX_FRAGMENT < gpa < start + self._size:
            return gpa, size
        return start, min(self._size, _PAGE_MASK + 1 - (start & _PAGE_MASK))

    def on_read(self, gpa: int, size: int) -> int:
        """The window is read."""
        if self.unanswered is not None:
            return 0
        if self._is_new:
            self._is_new = False
            start, length = self._extent(gpa, size)
            if self._reads == len(self.answers):
                self.unanswered = start, min(length, _MAX_FRAGMENT)
                return 0
            self._data, self._data_gpa = self.answers[self._reads], start
            self._reads += 1
        piece = bytearray(size)
        for i in range(size):
            at = gpa + i - self._data_gpa
            if 0 <= at < len(self._data):
                piece[i] = self._data[at]
        return int.from_bytes(piece, "little")

    def on_write(self, gpa: int, size: int, value: int) -> None:
        """The window is written."""
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        if self.writes and not self._is_new:
            last_gpa, last = self.writes[-1]
            if last_gpa + len(last) == gpa and len(last) + size <= _MAX_FRAGMENT:
                self.writes[-1] = last_gpa, last + data
                return
        self._is_new = False
        self.writes.append((gpa, data))


def emulate_device_access(vcpu: KvmVcpu, devices: DeviceAccesses) -> int:
    """``x86_emulate_instruction`` for a device access: 1, or 0 (KVM_EXIT_MMIO or an error).

    Raises :class:`AccessFailed` for an access to memory by the same instruction.
    """
    cpu = vcpu.cpu
    before = cpu.save()
    devices.begin(cpu.rip)
    vcpu.device_pages = {}
    cpu.flush_tlb()
    with cpu.watching(devices.on_access):
        stop = cpu.run(one_step=True)
    vcpu.device_pages = None
    cpu.flush_tlb()
    if devices.unanswered is not None:
        cpu.restore(before)
        gpa, size = devices.unanswered
        vcpu.complete_userspace_io = lambda: _complete_read(vcpu, devices, size)
        return _exit_mmio(vcpu, gpa, bytes(size), is_write=False)
    if stop.kind is StopKind.REFUSED:
        cpu.restore(before)
        if isinstance(vcpu.refusal, Emulate):
            text = f"access to {vcpu.refusal.gpa:#x}, where no memory slot is"
            return internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_EMULATION, text)
        raise AccessFailed(vcpu.refusal)
    if stop.kind is not StopKind.REQUESTED:
        cpu.restore(before)
        text = f"a device access by an instruction that stops the processor ({stop.kind.name})"
        return internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_EMULATION, text)
    writes = devices.writes
    devices.begin(-1)  # the instruction is done: its answers are spent
    return _exit_writes(vcpu, writes)


def _exit_mmio(vcpu: KvmVcpu, gpa: int, data: bytes, *, is_write: bool) -> int:
    run = vcpu.run
    run.exit_reason = uapi.KVM_EXIT_MMIO
    run.mmio.phys_addr = gpa
    run.mmio.data[: len(data)] = data
    run.mmio.len = len(data)
    run.mmio.is_write = is_write
    vcpu.stat.mmio_exits += 1
    return 0


def _complete_read(vcpu: KvmVcpu, devices: DeviceAccesses, size: int) -> int:
    devices.answers.append(bytes(vcpu.run.mmio.data[:size]))
    return emulate_device_access(vcpu, devices)


def _exit_writes(vcpu: KvmVcpu, writes: list[tuple[int, bytes]]) -> int:
    if not writes:
        return 1
    (gpa, data), *rest = writes
    if rest:
        vcpu.complete_userspace_io = lambda: _exit_writes(vcpu, rest)
    return _exit_mmio(vcpu, gpa, data, is_write=True)
