"""What one ``KVM_RUN`` came to, as a value that can be matched.

``KVM_RUN`` answers in two places: the result of the ioctl, and ``struct kvm_run``, most of which is
one union that each exit overwrites in its own way and nobody clears.  The kernel vouches for a
member of that union only together with the right pair of result and ``exit_reason``; everything
else in it is left over from some earlier exit.  A VMM that reads ``memory_fault.gpa`` after a bare
``-EFAULT`` mends a page that was never asked for, and asks again.

So the union is read in one place, here, and only those fields that the kernel has just filled are
copied out.  The caller gets a frozen record of one of the types below, and cannot reach a stale
field by mistake because no record has one:

>>> match outcome(vcpu.run(), vcpu.kvm_run, interface):  # doctest: +SKIP
...     case MemoryFault(gpa, size):
...         print(f"the kernel says: {size} bytes at {gpa:#x}")
...     case BareFault():
...         print("a guest access failed and the kernel does not say which")
...     case Interrupted():
...         print("kicked")

**Three shapes of an absent page.**  The same missing page of guest memory can come out as
:class:`MemoryFault` (the kernel annotated the fault), as :class:`BareFault` (it did not), or as
:class:`RamMmio`: where KVM's instruction emulator, not the processor, made the access, KVM takes
the failed access for device I/O, and ``KVM_RUN`` *succeeds* with ``KVM_EXIT_MMIO`` on an address
that lies inside a memory slot.  A VMM that answers such a read with zeros corrupts its guest
silently.

**A page that is broken** comes out elsewhere altogether: the thread is sent a SIGBUS, and KVM_RUN
fails with -EINTR as if somebody had kicked the vCPU.  Whoever runs vCPUs takes that signal
(:func:`guestfault.linux.sigbus.take_sigbus`) and passes it on to :func:`outcome`, which then has a
:class:`Poisoned` for it.

The result of the ioctl decides before ``exit_reason`` does: after a failure, ``exit_reason`` means
something only in the one combination that the
:class:`~guestfault.dialect.interface.MemoryFaultInterface` names, and after a success only the
exits below are read.  The interface also says where the fault is described: in the union, or, in
one version that was never merged, in a second union behind it.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

from guestfault.dialect.interface import EHWPOISON, MemoryFaultInterface, Payload
from guestfault.dialect.unmerged import kvm_run_v5
from guestfault.linux.sigbus import Sigbus
from guestfault.uapi import kvm as uapi

__all__ = [
    "BareFault",
    "FailEntry",
    "Failed",
    "Hlt",
    "InternalError",
    "Interrupted",
    "Io",
    "MemoryFault",
    "Mmio",
    "Outcome",
    "Poisoned",
    "RamMmio",
    "Shutdown",
    "SystemEvent",
    "Unknown",
    "outcome",
]

_UNION = Payload.UNION


@dataclass(frozen=True, slots=True)
class MemoryFault:
    """The kernel could not resolve an access to ``[gpa, gpa + size)``, and says so.

    ``flags`` are the interface's own bits (:meth:`MemoryFaultInterface.flag_names`); ``errno`` is
    what ``KVM_RUN`` failed with, positive, or 0 under an interface that reports faults by a
    success.
    """

    gpa: int
    size: int
    flags: int
    errno: int


@dataclass(frozen=True, slots=True)
class BareFault:
    """A guest access failed (``errno`` is EFAULT or EHWPOISON) and the kernel does not say which.

    The vCPU still stands before the instruction: once the page is there, running again retries it.
    """

    errno: int


@dataclass(frozen=True, slots=True)
class Poisoned:
    """The guest accessed a page that is lost: ``2**lsb`` bytes of host memory around ``hva``.

    The vCPU stands before the instruction and will not get past it.  Without ``action_required``
    nobody has accessed the page yet, and the vCPU can run on until the guest does.
    """

    hva: int
    lsb: int
    action_required: bool = True


@dataclass(frozen=True, slots=True)
class Mmio:
    """An access of ``length`` bytes to guest physical memory that has no slot: a device's.

    ``data`` holds the bytes of a write, and nothing for a read, whose answer belongs in
    ``kvm_run.mmio.data`` before the next ``KVM_RUN``.
    """

    gpa: int
    data: bytes
    length: int
    is_write: bool


@dataclass(frozen=True, slots=True)
class RamMmio:
    """The same exit on an address inside a memory slot: RAM that KVM's emulator could not reach.

    Bring the page in; then answer a read from it, through ``kvm_run.mmio.data``, or apply the write
    to it: the instruction that wrote is already past and will not do it again.
    """

    gpa: int
    data: bytes
    length: int
    is_write: bool


@dataclass(frozen=True, slots=True)
class Io:
    """``count`` accesses of ``size`` bytes to an I/O port; the data lie in the vCPU's run area.

    They start ``data_offset`` bytes into :attr:`~guestfault.kvm.protocols.Vcpu.run_area`: read them
    there if the guest writes, put them there before the next ``KVM_RUN`` if it reads (``is_in``).
    """

    port: int
    size: int
    count: int
    is_in: bool
    data_offset: int


@dataclass(frozen=True, slots=True)
class Hlt:
    """The guest halted, and no interrupt controller of KVM's is there to wait for an interrupt."""


@dataclass(frozen=True, slots=True)
class Shutdown:
    """The vCPU shut down: on x86, mostly a triple fault."""


@dataclass(frozen=True, slots=True)
class InternalError:
    """KVM gave up: ``suberror`` is a ``KVM_INTERNAL_ERROR_*`` and ``data`` the words it left.

    ``instruction`` is what the emulator could not emulate, up to 15 bytes from RIP on, or empty
    where the kernel does not say.
    """

    suberror: int
    data: tuple[int, ...]
    instruction: bytes


@dataclass(frozen=True, slots=True)
class FailEntry:
    """The processor refused to enter the guest; ``hardware_reason`` is its own code for why.

    ``cpu`` is the host CPU it happened on.
    """

    hardware_reason: int
    cpu: int


@dataclass(frozen=True, slots=True)
class SystemEvent:
    """The guest asked for something of the whole machine: ``type`` is a ``KVM_SYSTEM_EVENT_*``.

    ``data`` are the words that came with it; they are the kernel's own where it has
    ``KVM_CAP_SYSTEM_EVENT_DATA`` (Linux 5.19).
    """

    type: int
    data: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Interrupted:
    """A signal or ``kvm_run.immediate_exit`` ended the run; the guest is unharmed: run it again."""


@dataclass(frozen=True, slots=True)
class Failed:
    """``KVM_RUN`` failed with another ``errno``, positive; nothing in ``kvm_run`` belongs to it."""

    errno: int


@dataclass(frozen=True, slots=True)
class Unknown:
    """A successful ``KVM_RUN`` with an exit that no type above stands for."""

    exit_reason: int


Outcome: TypeAlias = (
    MemoryFault
    | BareFault
    | Poisoned
    | Mmio
    | RamMmio
    | Io
    | Hlt
    | Shutdown
    | InternalError
    | FailEntry
    | SystemEvent
    | Interrupted
    | Failed
    | Unknown
)


def outcome(
    ret: int,
    kvm_run: uapi.kvm_run,
    interface: MemoryFaultInterface | None,
    in_slot: Callable[[int], bool] | None = None,
    sigbus: Sigbus | None = None,
) -> Outcome:
    """Say what a ``KVM_RUN`` came to; reads ``kvm_run`` once and keeps nothing of it.

    ``ret`` is what :meth:`~guestfault.kvm.protocols.Vcpu.run` returned: 0 or a negative errno.
    ``interface`` is how this KVM reports memory faults, from
    :func:`guestfault.dialect.interface.probe`.  ``in_slot`` tells whether a guest physical address
    lies in a memory slot; without it no :class:`Mmio` can be recognised as a :class:`RamMmio`.
    ``sigbus`` is the signal that was pending after the run, if one was.

    Raises :class:`ValueError` for a positive ``ret`` (an errno with its sign lost),
    :class:`TypeError` under an interface with a second union for a view of ``kvm_run`` that is not
    a :class:`~guestfault.dialect.unmerged.kvm_run_v5`, and nothing for anything that ``kvm_run``
    may hold.
    """
    if ret > 0:
        raise ValueError(f"KVM_RUN returns 0 or a negative errno, not {ret}")
    exit_reason = kvm_run.exit_reason
    if ret == -errno.EINTR:
        if sigbus is not None:
            return Poisoned(sigbus.address, sigbus.lsb, sigbus.action_required)
        return Interrupted()
    if interface is not None and interface.is_memory_fault(ret, exit_reason, kvm_run.flags):
        if interface.payload is _UNION:
            fault = kvm_run.memory_fault
            return MemoryFault(fault.gpa, fault.size, fault.flags * interface.flags_written, -ret)
        return _second_union(ret, kvm_run)
    if ret in (-errno.EFAULT, -EHWPOISON):
        return BareFault(-ret)
    if ret < 0:
        return Failed(-ret)
    match exit_reason:
        case uapi.KVM_EXIT_MMIO:
            return _mmio(kvm_run, in_slot)
        case uapi.KVM_EXIT_IO:
            io = kvm_run.io
            is_in = io.direction == uapi.KVM_EXIT_IO_IN
            return Io(io.port, io.size, io.count, is_in, io.data_offset)
        case uapi.KVM_EXIT_HLT:
            return Hlt()
        case uapi.KVM_EXIT_SHUTDOWN:
            return Shutdown()
        case uapi.KVM_EXIT_INTERNAL_ERROR:
            return _internal_error(kvm_run)
        case uapi.KVM_EXIT_FAIL_ENTRY:
            entry = kvm_run.fail_entry
            return FailEntry(entry.hardware_entry_failure_reason, entry.cpu)
        case uapi.KVM_EXIT_SYSTEM_EVENT:
            event = kvm_run.system_event
            return SystemEvent(event.type, tuple(event.data[: event.ndata]))
        case uapi.KVM_EXIT_INTR:
            return Interrupted()
    return Unknown(exit_reason)


def _second_union(ret: int, kvm_run: uapi.kvm_run) -> MemoryFault:
    if not isinstance(kvm_run, kvm_run_v5):
        raise TypeError("the view of kvm_run ends before the union that the fault is in")
    second = kvm_run.speculative_exit.memory_fault
    return MemoryFault(second.gpa, second.len, second.flags, -ret)


def _mmio(kvm_run: uapi.kvm_run, in_slot: Callable[[int], bool] | None) -> Mmio | RamMmio:
    mmio = kvm_run.mmio
    gpa, length, is_write = mmio.phys_addr, mmio.len, bool(mmio.is_write)
    data = bytes(mmio.data[:length]) if is_write else b""
    kind = RamMmio if in_slot is not None and in_slot(gpa) else Mmio
    return kind(gpa, data, length, is_write)


def _internal_error(kvm_run: uapi.kvm_run) -> InternalError:
    internal = kvm_run.internal
    data = tuple(internal.data[: internal.ndata])
    instruction = b""
    # The words of an emulation failure: flags, then, if they say so, a length and 15 bytes in two.
    if internal.suberror == uapi.KVM_INTERNAL_ERROR_EMULATION and len(data) >= 3:
        failure = kvm_run.emulation_failure
        if failure.flags & uapi.KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES:
            instruction = bytes(failure.insn_bytes[: failure.insn_size])
    return InternalError(internal.suberror, data, instruction)
