"""The VM as userspace holds it: memory slots, vCPUs, dirty log, and the host's invalidations."""

from __future__ import annotations

import errno

from guestfault.dialect.record import Ask, Dialect, Enabling
from guestfault.errors import KvmError
from guestfault.softkvm.capabilities import (
    MAX_VCPUS,
    check_extension,
    has_region2,
    may_enable,
    valid_slot_flags,
)
from guestfault.softkvm.guest_memfd import (
    kvm_gmem_bind,
    kvm_gmem_create,
    kvm_gmem_destroy,
    kvm_gmem_unbind,
)
from guestfault.softkvm.kvm_host import Kvm, kvm_flush_remote_tlbs, kvm_get_running_vcpu
from guestfault.softkvm.mem_attributes import kvm_vm_ioctl_set_mem_attributes
from guestfault.softkvm.memslots import kvm_set_memory_region
from guestfault.softkvm.mm import Mm
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.processor import MakeProcessor
from guestfault.softkvm.set_memslot import kvm_set_memslot
from guestfault.softkvm.shadow import kvm_mmu_init_vm
from guestfault.softkvm.vcpu import SoftVcpu
from guestfault.uapi import kvm as uapi

__all__ = ["SoftVm"]


class SoftVm:
    """See :class:`guestfault.kvm.protocols.Vm`.  Made by ``SoftSystem.create_vm``.

    It is also its host memory's notifier (:class:`guestfault.linux.mmu_notifier.MmuNotifier`).
    """

    def __init__(
        self,
        dialect: Dialect,
        mm: Mm,
        *,
        tdp_enabled: bool = True,
        make_processor: MakeProcessor | None = None,
        vm_type: int = uapi.KVM_X86_DEFAULT_VM,
    ) -> None:
        self.kvm = Kvm(
            dialect, mm, tdp_enabled=tdp_enabled, make_processor=make_processor, vm_type=vm_type
        )
        self._vcpus: dict[int, SoftVcpu] = {}
        self._closed = False
        if not tdp_enabled:
            kvm_mmu_init_vm(self.kvm)
        mm.mmu_notifier_register(self)

    def check_extension(self, cap: int) -> int:
        """``KVM_CHECK_EXTENSION``."""
        kvm = self.kvm
        return check_extension(
            kvm.dialect, cap, tdp_enabled=kvm.tdp_enabled, has_private_mem=kvm.has_private_mem
        )

    def enable_cap(self, cap: int, args: tuple[int, ...] = (), flags: int = 0) -> None:
        """``KVM_ENABLE_CAP``, for the dialects in which userspace must opt in.

        What was asked for replaces what was asked for before.  EINVAL for every other capability.
        """
        detail = f"capability {cap}, args {args}, flags {flags:#x}"
        info = self.kvm.dialect.info
        asked = args[0] if args else 0
        if info is None or cap != info.number or flags or not may_enable(self.kvm.dialect, asked):
            raise KvmError("KVM_ENABLE_CAP", errno.EINVAL, detail)
        if info.enabling is Enabling.OPT_IN:
            self.kvm.fill_efault_info = asked == 1
        else:
            self.kvm.memfault_exit_reasons = asked

    def set_mem_fault_nowait(self, state: bool) -> None:
        """``KVM_SET_MEM_FAULT_NOWAIT``, of the first version only; ENOTTY in all others."""
        missing = self.kvm.dialect.missing
        there = missing is not None and missing.ask is Ask.VM_SWITCH
        self._refuse_unless(there, "KVM_SET_MEM_FAULT_NOWAIT")
        self.kvm.mem_fault_nowait = state

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
        """``KVM_SET_USER_MEMORY_REGION``; its successor for one with a ``userfault_bitmap``.

        It waits for every fault in flight, as the kernel does (:mod:`guestfault.softkvm.srcu`), and
        so for a page that a vCPU sleeps for.  EDEADLK where the kernel would never come to: in a
        signal handler while its thread is in KVM_RUN.
        """
        mem = uapi.kvm_userspace_memory_region(
            slot, flags, guest_phys_addr, memory_size, userspace_addr
        )
        valid = valid_slot_flags(self.kvm.dialect, flags, userfault_bitmap != 0)
        self._set_region("KVM_SET_USER_MEMORY_REGION", mem, valid, userfault_bitmap)

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
        """``KVM_SET_USER_MEMORY_REGION2``: the same, and a guest_memfd behind it.

        ENOTTY in a dialect that does not have it.
        """
        name, kvm = "KVM_SET_USER_MEMORY_REGION2", self.kvm
        self._refuse_unless(has_region2(kvm.dialect), name)
        mem = uapi.kvm_userspace_memory_region(
            slot, flags, guest_phys_addr, memory_size, userspace_addr
        )
        private = kvm.has_private_mem
        valid = valid_slot_flags(kvm.dialect, flags, False, region2=True, has_private_mem=private)
        self._set_region(name, mem, valid, gmem=(guest_memfd, guest_memfd_offset))

    def _set_region(
        self,
        name: str,
        mem: uapi.kvm_userspace_memory_region,
        valid_flags: int,
        userfault_bitmap: int = 0,
        gmem: tuple[int, int] = (0, 0),
    ) -> None:
        kvm = self.kvm
        self._refuse_in_run(name)
        with kvm.slots_lock:
            r, old, new = kvm_set_memory_region(
                kvm.memslots,
                mem,
                valid_flags,
                kvm.userfault_flag,
                userfault_bitmap,
                kvm.gmem_flag,
            )
            if r == 0 and new is not None and mem.flags & kvm.gmem_flag:
                r = kvm_gmem_bind(kvm, new, *gmem)
            if r < 0:
                raise KvmError(
                    name,
                    -r,
                    f"slot {mem.slot}: gpa {mem.guest_phys_addr:#x}, {mem.memory_size:#x} bytes"
                    f" at {mem.userspace_addr:#x}, flags {mem.flags:#x}",
                )
            if old is None and new is None:
                return
            kvm_set_memslot(kvm, old, new)
            if old is not None and new is None:
                kvm_gmem_unbind(kvm, old)

    def _refuse_unless(self, there: bool, name: str) -> None:
        if not there:
            raise KvmError(name, errno.ENOTTY, f"{self.kvm.dialect.name} has no such ioctl")

    def _refuse_in_run(self, name: str) -> None:
        running = kvm_get_running_vcpu()
        if running is not None and running.kvm is self.kvm and running.srcu_seq & 1:
            # It would wait for the very thread that it is on.
            text = f"called in the midst of vCPU {running.vcpu_id}'s KVM_RUN, by a signal handler"
            raise KvmError(name, errno.EDEADLK, text)

    def create_guest_memfd(self, size: int, flags: int = 0) -> int:
        """``KVM_CREATE_GUEST_MEMFD``: a descriptor, which the caller closes.

        ENOTTY in a dialect that does not have it.
        """
        name, kvm = "KVM_CREATE_GUEST_MEMFD", self.kvm
        self._refuse_unless(kvm.dialect.has_guest_memfd, name)
        r = kvm_gmem_create(kvm, size, flags)
        if r < 0:
            raise KvmError(name, -r, f"{size:#x} bytes, flags {flags:#x}")
        return r

    def set_memory_attributes(self, address: int, size: int, attributes: int) -> None:
        """``KVM_SET_MEMORY_ATTRIBUTES`` of ``[address, address + size)``.

        ENOTTY in a dialect that does not have it; EDEADLK as with slots.
        """
        name, kvm = "KVM_SET_MEMORY_ATTRIBUTES", self.kvm
        self._refuse_unless(kvm.dialect.has_guest_memfd, name)
        self._refuse_in_run(name)
        r = kvm_vm_ioctl_set_mem_attributes(kvm, address, size, attributes)
        if r < 0:
            detail = f"[{address:#x}, {address + size:#x}), attributes {attributes:#x}"
            raise KvmError(name, -r, detail)

    def get_dirty_log(self, slot: int) -> bytes:
        """``KVM_GET_DIRTY_LOG``: what was written since, and write-protect it again."""
        kvm = self.kvm
        with kvm.slots_lock:
            memslot = kvm.memslots.by_id(slot)
            if memslot is None or not memslot.dirty_bitmap:
                raise KvmError("KVM_GET_DIRTY_LOG", errno.ENOENT, f"slot {slot} keeps no log")
            log, flush = kvm.second_stage.get_dirty_log(memslot)
            if flush:
                kvm_flush_remote_tlbs(kvm)
        return log

    def create_irqchip(self) -> None:
        """``KVM_CREATE_IRQCHIP``: local APICs in the kernel, see :mod:`.lapic` for how little."""
        if self.kvm.irqchip_in_kernel:
            raise KvmError("KVM_CREATE_IRQCHIP", errno.EEXIST, "there is one")
        if self._vcpus:
            raise KvmError("KVM_CREATE_IRQCHIP", errno.EINVAL, "there are vCPUs already")
        self.kvm.irqchip_in_kernel = True

    def create_vcpu(self, vcpu_id: int) -> SoftVcpu:
        """``KVM_CREATE_VCPU``."""
        if not 0 <= vcpu_id < MAX_VCPUS:
            raise KvmError("KVM_CREATE_VCPU", errno.EINVAL, f"id {vcpu_id} is not below 4096")
        if vcpu_id in self._vcpus:
            raise KvmError("KVM_CREATE_VCPU", errno.EEXIST, f"id {vcpu_id} is taken")
        vcpu = SoftVcpu(self.kvm, vcpu_id)
        self._vcpus[vcpu_id] = vcpu
        self.kvm.vcpus[vcpu_id] = vcpu.arch
        return vcpu

    # -- the host's mmu_notifier -------------------------------------------------------------------

    def invalidate_range_start(self, start: int, end: int) -> None:
        """The host is about to take pages away: see to it that no vCPU can touch them."""
        kvm = self.kvm
        preemption_point("invalidate_range_start: hold the slots", "memslots", True)
        with kvm.mn_invalidate_lock:
            kvm.mn_active_invalidate_count += 1
        if kvm.second_stage.invalidate_range_start(kvm.memslots, start, end):
            kvm_flush_remote_tlbs(kvm)

    def invalidate_range_end(self, start: int, end: int) -> None:
        """They are gone; faults may look again."""
        kvm = self.kvm
        kvm.second_stage.invalidate_range_end()
        preemption_point("invalidate_range_end: let the slots go", "memslots", True)
        with kvm.mn_invalidate_lock:
            kvm.mn_active_invalidate_count -= 1

    def close(self) -> None:
        """Release the VM and every vCPU of it.  Again is harmless."""
        if self._closed:
            return
        self._closed = True
        self.kvm.mm.mmu_notifier_unregister(self)
        for vcpu in self._vcpus.values():
            vcpu.close()
        self.kvm.workqueue.close()
        self._vcpus.clear()
        kvm_gmem_destroy(self.kvm)
