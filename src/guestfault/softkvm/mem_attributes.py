"""Memory attributes: which frames are private (``KVM_SET_MEMORY_ATTRIBUTES``, virt/kvm/kvm_main.c).

A VM of the type ``KVM_X86_SW_PROTECTED_VM`` has two memories, and each frame has an attribute that
says in which of them it is.  Userspace sets it, for the guest's memory is converted by agreement of
the two; the guest's next access then comes to the other memory.

So a change of attributes is an invalidation.  What is mapped is zapped first, and until the new
attributes are in place no fault of these frames may install anything; one that began before sees
another ``mmu_invalidate_seq``, and looks again.  Only frames in slots count: where there is none,
nobody is held off, and an entry that says "no memory" stays what it is.

The attributes are read without a lock, and a fault reads them twice
(:mod:`guestfault.softkvm.private_fault`).
"""

from __future__ import annotations

import errno

from guestfault.dialect.record import Dialect
from guestfault.softkvm.kvm_host import Kvm, kvm_flush_remote_tlbs
from guestfault.softkvm.memslots import PAGE_SIZE, Memslots
from guestfault.softkvm.preempt import preemption_point
from guestfault.uapi import kvm as uapi

__all__ = [
    "kvm_get_memory_attributes",
    "kvm_mem_is_private",
    "kvm_supported_mem_attributes",
    "kvm_vm_ioctl_set_mem_attributes",
    "kvm_vm_set_mem_attributes",
]

_MEM_ATTR = "mem_attr"
_PRIVATE = uapi.KVM_MEMORY_ATTRIBUTE_PRIVATE
_U64 = (1 << 64) - 1


def kvm_supported_mem_attributes(dialect: Dialect, has_private_mem: bool) -> int:
    """``KVM_MEMORY_ATTRIBUTE_*`` that memory of such a VM can have."""
    return _PRIVATE if has_private_mem and dialect.has_guest_memfd else 0


def kvm_get_memory_attributes(kvm: Kvm, gfn: int) -> int:
    """The attributes of a frame, as they are just now."""
    preemption_point("kvm_get_memory_attributes: read them", _MEM_ATTR)
    return kvm.mem_attr_array.load(gfn)


def kvm_mem_is_private(kvm: Kvm, gfn: int) -> bool:
    """Whether a frame is private; not asked where no memory can be."""
    return kvm_get_memory_attributes(kvm, gfn) & _PRIVATE != 0


def kvm_vm_ioctl_set_mem_attributes(kvm: Kvm, address: int, size: int, attributes: int) -> int:
    """Check a request, and carry it out: 0 or -EINVAL."""
    if attributes & ~kvm_supported_mem_attributes(kvm.dialect, kvm.has_private_mem):
        return -errno.EINVAL
    if size <= 0 or not 0 <= address <= _U64 or address + size > _U64:
        return -errno.EINVAL
    if (address | size) & PAGE_SIZE - 1:
        return -errno.EINVAL
    kvm_vm_set_mem_attributes(kvm, address // PAGE_SIZE, (address + size) // PAGE_SIZE, attributes)
    return 0


def kvm_vm_set_mem_attributes(kvm: Kvm, start: int, end: int, attributes: int) -> None:
    """Give ``[start, end)`` of the frames these attributes.

    When it returns, no vCPU uses what it had mapped by the old ones.
    """
    with kvm.slots_lock:
        preemption_point("kvm_vm_set_mem_attributes: look whether they have them", _MEM_ATTR)
        if kvm.mem_attr_array.range_has(start, end, attributes):
            return
        gfns = _in_slots(kvm.memslots, start, end)
        stage = kvm.second_stage
        # kvm_pre_set_memory_attributes()
        if gfns and stage.kvm_mmu_invalidate_begin(gfns):
            kvm_flush_remote_tlbs(kvm)
        preemption_point("kvm_vm_set_mem_attributes: store them", _MEM_ATTR, True)
        kvm.mem_attr_array.store_range(start, end, attributes)
        if gfns:
            stage.kvm_mmu_invalidate_end(gfns)


def _in_slots(memslots: Memslots, start: int, end: int) -> tuple[range, ...]:
    """The frames among them that slots hold."""
    found = (
        range(max(start, slot.base_gfn), min(end, slot.base_gfn + slot.npages))
        for slot in memslots.slots
    )
    return tuple(gfns for gfns in found if gfns)
