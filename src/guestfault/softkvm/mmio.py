"""Instructions that access a device: performed by KVM, answered by userspace.

The kernel decodes such an instruction and carries it out itself.  We let the processor carry it
out, one single step with a *device window* where the missing memory would be, and watch:

- A read that userspace has not answered yet abandons the step: the registers go back to where they
  were, and KVM_EXIT_MMIO asks for the data.  The next KVM_RUN repeats the step with the answer.
  RIP is still on the instruction when userspace sees the exit.
- Writes are collected while the instruction completes, and handed to userspace afterwards, at most
  eight bytes at a time (KVM calls them fragments).  RIP is past the instruction by then.
"""

from __future__ import annotations

from guestfault.softkvm.fault_address import refine
from guestfault.softkvm.internal_error import internal_error
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.processor import DEVICE_WINDOW, TRAP, StopKind
from guestfault.softkvm.refusal import AccessFailed, Emulate, GuestException
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import DB_VECTOR

__all__ = ["DeviceAccesses", "emulate_device_access"]

_PAGE_MASK = 0xFFF
_MAX_FRAGMENT = 8


class DeviceAccesses:
    """What one instruction does to devices, seen access by access.

    Unicorn hands the window an access in pieces: of four bytes at most, of one if it is not
    aligned, and with neighbours that nobody asked for if it is a read.  Its access hook, called
    just before the first piece, says what the access was.  An access is made of *fragments*, as in
    the kernel: the part of it in one page, at most eight bytes.
    """

    def __init__(self) -> None:
        self.rip = -1
        self.begin(-1)

    def begin(self, rip: int) -> None:
        """Before a step of the instruction at ``rip``; the answers to its earlier steps stay."""
        if rip == -1 or rip != self.rip:
            self.answers: list[bytes] = []
        self.rip = rip
        self.unanswered: tuple[int, int] | None = None
        self.writes: list[tuple[int, bytes]] = []
        self._address, self._size = 0, 0
        self._read: dict[int, bytes] = {}  # fragments of this access, by their gpa
        self._reads = 0
        self._write_is_new = False

    def forget(self) -> None:
        """The instruction that was waiting for answers will not be repeated."""
        if self.rip != -1:
            self.begin(-1)

    def on_access(self, address: int, size: int) -> None:
        """An access begins, at an engine-physical address."""
        self._address, self._size = address, size
        self._read = {}
        self._write_is_new = True

    def on_read(self, gpa: int, size: int) -> int:
        """A piece of the window is read."""
        piece = bytearray(size)
        start, length = self._fragment(gpa)
        if gpa < start + length and start < gpa + size:
            data = self._answer(start, length)
            for at in range(max(gpa, start), min(gpa + size, start + length)):
                piece[at - gpa] = data[at - start]
        return int.from_bytes(piece, "little")

    def _fragment(self, gpa: int) -> tuple[int, int]:
        """The access's fragment in the page of ``gpa``: its gpa and size."""
        page, offset = gpa & ~_PAGE_MASK, self._address & _PAGE_MASK
        first = min(self._size, _PAGE_MASK + 1 - offset)
        if page + offset == self._address - DEVICE_WINDOW:
            return page + offset, first
        return page, self._size - first  # the access began in the page before

    def _answer(self, gpa: int, size: int) -> bytes:
        data = self._read.get(gpa)
        if data is not None:
            return data
        if self.unanswered is not None:
            return bytes(size)  # the step is lost already
        if self._reads == len(self.answers):
            self.unanswered = gpa, size
            return bytes(size)
        data = self._read[gpa] = self.answers[self._reads]
        self._reads += 1
        return data

    def on_write(self, gpa: int, size: int, value: int) -> None:
        """A piece of the window is written."""
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        is_new, self._write_is_new = self._write_is_new, False
        if self.writes and not is_new and gpa & _PAGE_MASK:
            last_gpa, last = self.writes[-1]
            if last_gpa + len(last) == gpa and len(last) + size <= _MAX_FRAGMENT:
                self.writes[-1] = last_gpa, last + data
                return
        self.writes.append((gpa, data))


def emulate_device_access(vcpu: KvmVcpu, devices: DeviceAccesses) -> int:
    """``x86_emulate_instruction`` for a device access: 1, or 0 (KVM_EXIT_MMIO or an error).

    Raises :class:`AccessFailed` for an access to memory by the same instruction.
    """
    cpu = vcpu.cpu
    cpu.save()
    devices.begin(cpu.rip)
    vcpu.device_pages = {}
    cpu.flush_tlb()
    try:
        with cpu.watching(devices.on_access):
            stop = vcpu.enter_guest(cpu.step)
    finally:
        vcpu.device_pages = None
        cpu.flush_tlb()
    if devices.unanswered is not None:
        cpu.restore()
        gpa, size = devices.unanswered
        vcpu.complete_userspace_io = lambda: _complete_read(vcpu, devices, size)
        return _exit_mmio(vcpu, gpa, bytes(size), is_write=False)
    if stop.kind is StopKind.REFUSED:
        cpu.restore()
        if isinstance(vcpu.refusal, Emulate):
            text = f"access to {vcpu.refusal.gpa:#x}, where no memory slot is"
            return internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_EMULATION, text)
        raise AccessFailed(refine(vcpu, vcpu.refusal))
    if stop.kind is StopKind.REQUESTED:
        cpu.restore()
        return 1
    if stop.kind is not StopKind.STEPPED and stop != TRAP:
        cpu.restore()
        text = f"a device access by an instruction that stops the processor ({stop.kind.name})"
        return internal_error(vcpu, uapi.KVM_INTERNAL_ERROR_EMULATION, text)
    writes = devices.writes
    devices.forget()  # the instruction is done: its answers are spent
    if stop == TRAP:
        vcpu.pending_exception = GuestException(DB_VECTOR)
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
    if vcpu.cpu.rip != devices.rip:
        return 1  # userspace has sent the vCPU elsewhere
    devices.answers.append(bytes(vcpu.run.mmio.data[:size]))
    return emulate_device_access(vcpu, devices)


def _exit_writes(vcpu: KvmVcpu, writes: list[tuple[int, bytes]]) -> int:
    if not writes:
        return 1
    (gpa, data), *rest = writes
    if rest:
        vcpu.complete_userspace_io = lambda: _exit_writes(vcpu, rest)
    return _exit_mmio(vcpu, gpa, data, is_write=True)
