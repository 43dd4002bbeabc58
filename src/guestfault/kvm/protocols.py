"""One interface, two KVMs: the three objects that ``/dev/kvm`` and the software KVM both offer.

They follow KVM's own three levels of file descriptor.  Nothing above the rooms ``kvm`` and
``softkvm`` knows which of the two it runs on.

:meth:`Vcpu.run` returns what the ``KVM_RUN`` ioctl returns, 0 or a negative errno, and leaves the
rest in :attr:`Vcpu.kvm_run`, which has the kernel's exact layout in software too.  Read the pair
through :func:`guestfault.fault.outcome.outcome` only: most fields are stale most of the time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from signal import Signals
from typing import Protocol

from guestfault.uapi import kvm as uapi

__all__ = ["System", "Vcpu", "Vm"]


class Vcpu(Protocol):
    """One virtual CPU.  Only one thread at a time may be inside :meth:`run`."""

    @property
    def vcpu_id(self) -> int:
        """The id it was created with."""

    @property
    def kvm_run(self) -> uapi.kvm_run:
        """The page shared with KVM (``struct kvm_run``), live."""

    @property
    def run_area(self) -> memoryview:
        """The whole shared area; the data of a ``KVM_EXIT_IO`` is at ``kvm_run.io.data_offset``."""

    def run(self) -> int:
        """``KVM_RUN``: enter the guest; 0 or a negative errno.  Blocks without holding the GIL."""

    def kick(self) -> None:
        """From any thread: make a :meth:`run` in progress, or else the next one, return -EINTR.

        It sets ``kvm_run.immediate_exit``, and the :meth:`run` that returns the -EINTR clears it.
        Kicks that meet in one run are one.
        """

    def set_interrupting_signals(self, signals: Iterable[Signals]) -> None:
        """Signals that end a :meth:`run` with -EINTR even where the running thread blocks them.

        They are pending then.  Set it for SIGBUS before a thread runs the vCPU that holds it
        (:class:`guestfault.linux.sigbus.SigbusHeld`): an access to broken memory would else be made
        again for ever.  It holds for every run after this, and not for one in progress.
        """

    def get_regs(self) -> uapi.kvm_regs:
        """``KVM_GET_REGS``, a copy."""

    def set_regs(self, regs: uapi.kvm_regs) -> None:
        """``KVM_SET_REGS``."""

    def get_sregs(self) -> uapi.kvm_sregs:
        """``KVM_GET_SREGS``, a copy."""

    def set_sregs(self, sregs: uapi.kvm_sregs) -> None:
        """``KVM_SET_SREGS``; raises :class:`~guestfault.errors.KvmError` (EINVAL) on bad state."""

    def get_msrs(self, indices: Iterable[int]) -> dict[int, int]:
        """``KVM_GET_MSRS``: model-specific registers, by their index.

        Raises :class:`~guestfault.errors.KvmError` (EINVAL), which names the first that there is
        not.
        """

    def set_msrs(self, values: Mapping[int, int]) -> None:
        """``KVM_SET_MSRS``, in the mapping's order.

        Raises :class:`~guestfault.errors.KvmError` (EINVAL), which names the first that there is
        not, or that does not take its value; those before it are written.
        """

    def get_mp_state(self) -> int:
        """``KVM_GET_MP_STATE``: a ``KVM_MP_STATE_*``."""

    def set_mp_state(self, mp_state: int) -> None:
        """``KVM_SET_MP_STATE``.

        Raises :class:`~guestfault.errors.KvmError` (EINVAL) for a state that there is not; without
        a local APIC in the kernel there is KVM_MP_STATE_RUNNABLE only.
        """

    def translate(self, gva: int) -> uapi.kvm_translation:
        """``KVM_TRANSLATE``: walk the guest's tables for a linear address, without faulting."""

    def close(self) -> None:
        """Release the vCPU.  Not while a thread is inside :meth:`run`."""


class Vm(Protocol):
    """One virtual machine: its memory slots and its vCPUs."""

    def check_extension(self, cap: int) -> int:
        """``KVM_CHECK_EXTENSION`` on the VM, whose answer can differ from the system's."""

    def enable_cap(self, cap: int, args: tuple[int, ...] = (), flags: int = 0) -> None:
        """``KVM_ENABLE_CAP``; raises :class:`~guestfault.errors.KvmError` (EINVAL) if refused."""

    def set_user_memory_region(
        self,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        userspace_addr: int,
        flags: int = 0,
        *,
        userfault_bitmap: int = 0,
    ) -> None:
        """``KVM_SET_USER_MEMORY_REGION``; a size of 0 deletes the slot.

        ``userfault_bitmap`` is KVM Userfault's: the address of a bit for each page, in whole 64-bit
        words, which comes with ``KVM_MEM_USERFAULT`` in ``flags`` and by
        ``KVM_SET_USER_MEMORY_REGION2``.

        Raises :class:`~guestfault.errors.KvmError` with EINVAL for bad arguments and EEXIST for a
        slot that overlaps another in guest physical memory.
        """

    def set_user_memory_region2(
        self,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        userspace_addr: int,
        flags: int = 0,
        guest_memfd: int = 0,
        guest_memfd_offset: int = 0,
    ) -> None:
        """``KVM_SET_USER_MEMORY_REGION2`` (``KVM_CAP_USER_MEMORY2``): the same, and a guest_memfd.

        ``guest_memfd`` is a file descriptor that counts only with ``KVM_MEM_GUEST_MEMFD`` in
        ``flags``; ``userspace_addr`` is then where the slot's *shared* pages lie.  A slot with one
        can be deleted, and not changed.

        Raises :class:`~guestfault.errors.KvmError`: ENOTTY where there is no such ioctl, EBADF for
        a descriptor that is none, EINVAL for a part of the file that another slot has.
        """

    def create_guest_memfd(self, size: int, flags: int = 0) -> int:
        """``KVM_CREATE_GUEST_MEMFD`` of ``size`` bytes: a file descriptor, which the caller closes.

        ``flags`` are ``GUEST_MEMFD_FLAG_*``, as far as ``KVM_CAP_GUEST_MEMFD_FLAGS`` has them.
        With the last reference to the file its memory goes, from under the slots that have it.
        """

    def set_memory_attributes(self, address: int, size: int, attributes: int) -> None:
        """``KVM_SET_MEMORY_ATTRIBUTES`` of ``[address, address + size)`` of guest physical memory.

        ``attributes`` are ``KVM_MEMORY_ATTRIBUTE_*``, as far as ``KVM_CAP_MEMORY_ATTRIBUTES`` has
        them: that depends on the VM's type.
        """

    def set_mem_fault_nowait(self, state: bool) -> None:
        """``KVM_SET_MEM_FAULT_NOWAIT``: whether guest faults in every slot fail rather than wait.

        Of the first version of the series only; all others, and every released kernel, raise
        :class:`~guestfault.errors.KvmError` (ENOTTY).
        """

    def get_dirty_log(self, slot: int) -> bytes:
        """``KVM_GET_DIRTY_LOG``: one bit per page written since the last call, least bit first."""

    def create_irqchip(self) -> None:
        """``KVM_CREATE_IRQCHIP``: interrupt controllers in the kernel.

        HLT is then no exit: the vCPU sleeps inside :meth:`Vcpu.run`.  Every vCPU but the first is
        created KVM_MP_STATE_UNINITIALIZED.  Before the first vCPU: raises
        :class:`~guestfault.errors.KvmError` with EINVAL after it, with EEXIST the second time.
        """

    def create_vcpu(self, vcpu_id: int) -> Vcpu:
        """``KVM_CREATE_VCPU``."""

    def close(self) -> None:
        """Release the VM and every vCPU of it."""


class System(Protocol):
    """``/dev/kvm``, or the software KVM in one dialect."""

    @property
    def name(self) -> str:
        """What it is, for people: ``/dev/kvm`` or ``softkvm (seed)``."""

    @property
    def tdp_enabled(self) -> bool | None:
        """Two-dimensional paging (EPT, NPT), or shadow page tables; ``None``: it cannot be told."""

    def check_extension(self, cap: int) -> int:
        """``KVM_CHECK_EXTENSION``: 0 if absent, else 1 or the capability's number."""

    def create_vm(self, vm_type: int = uapi.KVM_X86_DEFAULT_VM) -> Vm:
        """``KVM_CREATE_VM`` of a type ``KVM_X86_*_VM``.

        Raises :class:`~guestfault.errors.KvmError` (EINVAL) for one that there is not
        (``KVM_CAP_VM_TYPES`` is the bit mask of those that there are).
        """

    def close(self) -> None:
        """Release the system's file descriptor."""
