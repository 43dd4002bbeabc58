"""The VM as userspace holds it: memory slots, vCPUs, dirty log, and the host's invalidations."""

from __future__ import annotations

import errno

from guestfault.dialect.record import Dialect
from guestfault.errors import KvmError
from guestfault.softkvm.capabilities import MAX_VCPUS, check_extension, valid_slot_flags
from guestfault.softkvm.kvm_host import Kvm, Request, kvm_make_request
from guestfault.softkvm.memslots import kvm_set_memory_region
from guestfault.softkvm.mm import Mm
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.processor import MakeProcessor
from guestfault.softkvm.second_stage import PT_WRITABLE
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
    ) -> None:
        self.kvm = Kvm(dialect, mm, tdp_enabled=tdp_enabled, make_processor=make_processor)
        self._vcpus: dict[int, SoftVcpu] = {}
        self._closed = False
        mm.mmu_notifier_register(self)

    def check_extension(self, cap: int) -> int:
        """``KVM_CHECK_EXTENSION``."""
        return check_extension(self.kvm.dialect, cap)

    def enable_cap(self, cap: int, args: tuple[int, ...] = (), flags: int = 0) -> None:
        """``KVM_ENABLE_CAP``: no capability here needs enabling, and so none can be."""
        raise KvmError("KVM_ENABLE_CAP", errno.EINVAL, f"capability {cap} is not one to enable")

    def set_user_memory_region(
        self,
        slot: int,
        guest_phys_addr: int,
        memory_size: int,
        userspace_addr: int,
        flags: int = 0,
    ) -> None:
        """``KVM_SET_USER_MEMORY_REGION``."""
        mem = uapi.kvm_userspace_memory_region(
            slot, flags, guest_phys_addr, memory_size, userspace_addr
        )
        kvm = self.kvm
        with kvm.slots_lock:
            r, old, new = kvm_set_memory_region(kvm.memslots, mem, valid_slot_flags(kvm.dialect))
            if r < 0:
                raise KvmError(
                    "KVM_SET_USER_MEMORY_REGION",
                    -r,
                    f"slot {slot}: gpa {guest_phys_addr:#x}, {memory_size:#x} bytes"
                    f" at {userspace_addr:#x}, flags {flags:#x}",
                )
            if old is None and new is None:
                return
            # The new list first, then the zap: a fault that read the old list before the zap is
            # stale by its sequence, one that begins after it sees the new list.
            preemption_point("kvm_set_memory_region: publish the slots", "memslots", True)
            kvm.memslots = kvm.memslots.replaced(old, new)
            if old is not None:
                kvm.second_stage.zap_memslot(old)
                self._flush_remote_tlbs()

    def get_dirty_log(self, slot: int) -> bytes:
        """``KVM_GET_DIRTY_LOG``: what was written since, and write-protect it again."""
        kvm = self.kvm
        with kvm.slots_lock:
            memslot = kvm.memslots.by_id(slot)
            if memslot is None or not memslot.dirty_bitmap:
                raise KvmError("KVM_GET_DIRTY_LOG", errno.ENOENT, f"slot {slot} keeps no log")
            with kvm.second_stage.mmu_lock:
                log = bytes(memslot.dirty_bitmap)
                memslot.dirty_bitmap[:] = bytes(len(log))
                sptes = kvm.second_stage.sptes
                for gfn in range(memslot.base_gfn, memslot.base_gfn + memslot.npages):
                    if gfn in sptes:
                        sptes[gfn] &= ~PT_WRITABLE
            self._flush_remote_tlbs()
        return log

    def create_vcpu(self, vcpu_id: int) -> SoftVcpu:
        """``KVM_CREATE_VCPU``."""
        if not 0 <= vcpu_id < MAX_VCPUS:
            raise KvmError("KVM_CREATE_VCPU", errno.EINVAL, f"id {vcpu_id} is not below 4096")
        if vcpu_id in self._vcpus:
            raise KvmError("KVM_CREATE_VCPU", errno.EEXIST, f"id {vcpu_id} is taken")
        vcpu = SoftVcpu(self.kvm, vcpu_id)
        self._vcpus[vcpu_id] = vcpu
        return vcpu

    def _flush_remote_tlbs(self) -> None:
        """``kvm_flush_remote_tlbs``: when it returns, no vCPU uses an entry that was zapped."""
        for vcpu in list(self._vcpus.values()):
            kvm_make_request(vcpu.arch, Request.TLB_FLUSH)

    # -- the host's mmu_notifier -------------------------------------------------------------------

    def invalidate_range_start(self, start: int, end: int) -> None:
        """The host is about to take pages away: see to it that no vCPU can touch them."""
        kvm = self.kvm
        if kvm.second_stage.invalidate_range_start(kvm.memslots, start, end):
            self._flush_remote_tlbs()

    def invalidate_range_end(self, start: int, end: int) -> None:
        """They are gone; faults may look again."""
        self.kvm.second_stage.invalidate_range_end()

    def close(self) -> None:
        """Release the VM and every vCPU of it.  Again is harmless."""
        if self._closed:
            return
        self._closed = True
        self.kvm.mm.mmu_notifier_unregister(self)
        for vcpu in self._vcpus.values():
            vcpu.close()
        self._vcpus.clear()
