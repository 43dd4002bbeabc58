"""A virtual machine of ``/dev/kvm``: its memory slots and its vCPUs.

A slot binds a range of guest physical memory to a range of this process's address space; the kernel
reads the binding at every fault, so the host range may be protected, remapped or registered with
userfaultfd while the slot stays.  A slot can instead be bound to a *guest_memfd*, memory that only
the guest can reach, through :meth:`KvmVm.set_user_memory_region2`.
"""

from __future__ import annotations

import os
from ctypes import Structure, addressof, byref, c_bool, c_uint64

from guestfault.dialect.unmerged import KVM_SET_MEM_FAULT_NOWAIT, USERFAULT_BITMAP_PAD
from guestfault.errors import KvmError
from guestfault.kvm.call import kvm_call
from guestfault.kvm.vcpu import KvmVcpu
from guestfault.linux.ioctl import ioctl
from guestfault.uapi import kvm as uapi

__all__ = ["TSS_ADDR", "KvmVm"]

TSS_ADDR = 0xFFFB_D000
"""Guest physical address of the three pages that Intel processors need in order to run real mode.

No slot may cover them, nor the page below: the identity map that KVM puts there by default.
"""

_PAGE_SHIFT = 12
_BITS_PER_LONG = 64


class KvmVm:
    """A virtual machine; made by :meth:`~guestfault.kvm.system.KvmSystem.create_vm`.

    Owns ``fd``.  ``run_area_size`` is ``KVM_GET_VCPU_MMAP_SIZE``, in bytes; ``cpuid`` is what every
    vCPU's guest will see.
    """

    def __init__(self, fd: int, run_area_size: int, cpuid: uapi.kvm_cpuid2) -> None:
        self._fd = fd
        self._run_area_size = run_area_size
        self._cpuid = cpuid
        self._pages: dict[int, int] = {}  # of each slot, for the size of its dirty log
        self._vcpus: list[KvmVcpu] = []
        try:
            if self.check_extension(uapi.KVM_CAP_SET_TSS_ADDR):
                kvm_call(fd, "KVM_SET_TSS_ADDR", TSS_ADDR, f"{TSS_ADDR:#x}")
        except BaseException:
            self.close()
            raise

    def check_extension(self, cap: int) -> int:
        """``KVM_CHECK_EXTENSION`` on the VM, whose answer can differ from the system's."""
        return kvm_call(self._fd, "KVM_CHECK_EXTENSION", cap, f"capability {cap}")

    def enable_cap(self, cap: int, args: tuple[int, ...] = (), flags: int = 0) -> None:
        """``KVM_ENABLE_CAP`` with up to four ``args``.

        Raises :class:`~guestfault.errors.KvmError` (EINVAL) if refused.
        """
        enable = uapi.kvm_enable_cap(cap=cap, flags=flags)
        enable.args[: len(args)] = args
        self._call("KVM_ENABLE_CAP", enable, f"capability {cap}, args {args}, flags {flags:#x}")

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

        With a ``userfault_bitmap`` it is ``KVM_SET_USER_MEMORY_REGION2``, whose padding a released
        kernel does not look at: it refuses the flag.

        Raises :class:`~guestfault.errors.KvmError` with EINVAL for bad arguments and EEXIST for a
        slot that overlaps another in guest physical memory.
        """
        if userfault_bitmap:
            region2 = uapi.kvm_userspace_memory_region2(
                slot, flags, guest_phys_addr, memory_size, userspace_addr
            )
            region2.pad2[USERFAULT_BITMAP_PAD] = userfault_bitmap
            detail = f"{_describe(region2)}, userfault_bitmap {userfault_bitmap:#x}"
            self._call("KVM_SET_USER_MEMORY_REGION2", region2, detail)
            self._remember(slot, memory_size)
            return
        region = uapi.kvm_userspace_memory_region(
            slot, flags, guest_phys_addr, memory_size, userspace_addr
        )
        self._call("KVM_SET_USER_MEMORY_REGION", region, _describe(region))
        self._remember(slot, memory_size)

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
        """``KVM_SET_USER_MEMORY_REGION2`` (Linux 6.8): the same, and a guest_memfd behind it.

        ``guest_memfd`` is a file descriptor that counts only with ``KVM_MEM_GUEST_MEMFD`` in
        ``flags``; ``userspace_addr`` is then where the slot's *shared* pages lie.
        """
        region = uapi.kvm_userspace_memory_region2(
            slot,
            flags,
            guest_phys_addr,
            memory_size,
            userspace_addr,
            guest_memfd_offset,
            guest_memfd,
        )
        detail = f"{_describe(region)}, guest_memfd {guest_memfd} from {guest_memfd_offset:#x} on"
        self._call("KVM_SET_USER_MEMORY_REGION2", region, detail)
        self._remember(slot, memory_size)

    def set_mem_fault_nowait(self, state: bool) -> None:
        """``KVM_SET_MEM_FAULT_NOWAIT``, which no released kernel has (ENOTTY).

        See :meth:`guestfault.kvm.protocols.Vm.set_mem_fault_nowait`.
        """
        ret = ioctl(self._fd, KVM_SET_MEM_FAULT_NOWAIT, byref(c_bool(state)))
        if ret < 0:
            raise KvmError("KVM_SET_MEM_FAULT_NOWAIT", -ret, f"state {state}")

    def create_guest_memfd(self, size: int, flags: int = 0) -> int:
        """``KVM_CREATE_GUEST_MEMFD`` of ``size`` bytes: a file descriptor, which the caller closes.

        ``flags`` are ``GUEST_MEMFD_FLAG_*``, as far as ``KVM_CAP_GUEST_MEMFD_FLAGS`` has them.
        """
        request = uapi.kvm_create_guest_memfd(size=size, flags=flags)
        return self._call("KVM_CREATE_GUEST_MEMFD", request, f"{size:#x} bytes, flags {flags:#x}")

    def set_memory_attributes(self, address: int, size: int, attributes: int) -> None:
        """``KVM_SET_MEMORY_ATTRIBUTES`` of ``[address, address + size)`` of guest physical memory.

        ``attributes`` are ``KVM_MEMORY_ATTRIBUTE_*``, as far as ``KVM_CAP_MEMORY_ATTRIBUTES`` has
        them.
        """
        request = uapi.kvm_memory_attributes(address=address, size=size, attributes=attributes)
        detail = f"[{address:#x}, {address + size:#x}), attributes {attributes:#x}"
        self._call("KVM_SET_MEMORY_ATTRIBUTES", request, detail)

    def get_dirty_log(self, slot: int) -> bytes:
        """``KVM_GET_DIRTY_LOG``: one bit per page written since the last call, least bit first.

        As many whole 64-bit words as the slot's pages take.  Raises
        :class:`~guestfault.errors.KvmError` (ENOENT) for a slot without
        ``KVM_MEM_LOG_DIRTY_PAGES``.
        """
        words = -(-self._pages.get(slot, 0) // _BITS_PER_LONG)
        bitmap = (c_uint64 * words)()
        log = uapi.kvm_dirty_log(slot=slot)
        log.dirty_bitmap = addressof(bitmap)
        self._call("KVM_GET_DIRTY_LOG", log, f"slot {slot}")
        return bytes(bitmap)

    def create_irqchip(self) -> None:
        """``KVM_CREATE_IRQCHIP``: see :meth:`guestfault.kvm.protocols.Vm.create_irqchip`."""
        kvm_call(self._fd, "KVM_CREATE_IRQCHIP")

    def create_vcpu(self, vcpu_id: int) -> KvmVcpu:
        """``KVM_CREATE_VCPU``, with the CPUID that KVM supports set at once.

        A vCPU without it has no long mode, and newer kernels hold ``KVM_SET_SREGS`` to that.
        Raises :class:`~guestfault.errors.KvmError` with EEXIST for an id that is taken.
        """
        fd = kvm_call(self._fd, "KVM_CREATE_VCPU", vcpu_id, f"vCPU {vcpu_id}")
        try:
            kvm_call(fd, "KVM_SET_CPUID2", byref(self._cpuid), f"{self._cpuid.nent} entries")
            vcpu = KvmVcpu(fd, vcpu_id, self._run_area_size)
        except BaseException:
            os.close(fd)
            raise
        self._vcpus.append(vcpu)
        return vcpu

    def close(self) -> None:
        """Release the VM and every vCPU of it.  Again is harmless."""
        for vcpu in self._vcpus:
            vcpu.close()
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def _call(self, name: str, arg: Structure, detail: str) -> int:
        return kvm_call(self._fd, name, byref(arg), detail)

    def _remember(self, slot: int, memory_size: int) -> None:
        self._pages[slot] = memory_size >> _PAGE_SHIFT


def _describe(region: uapi.kvm_userspace_memory_region | uapi.kvm_userspace_memory_region2) -> str:
    return (
        f"slot {region.slot}, gpa {region.guest_phys_addr:#x}, size {region.memory_size:#x}, "
        f"hva {region.userspace_addr:#x}, flags {region.flags:#x}"
    )
