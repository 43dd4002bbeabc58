"""What ``KVM_CHECK_EXTENSION`` answers in software: common to all dialects, and each one's own."""

from __future__ import annotations

from guestfault.dialect.record import Dialect, Enabling
from guestfault.softkvm.guest_memfd import kvm_gmem_get_supported_flags
from guestfault.softkvm.mem_attributes import kvm_supported_mem_attributes
from guestfault.softkvm.memslots import KVM_USER_MEM_SLOTS
from guestfault.uapi import kvm as uapi

__all__ = [
    "MAX_VCPUS",
    "check_extension",
    "has_region2",
    "may_enable",
    "valid_slot_flags",
    "vm_types",
]

MAX_VCPUS = 4096

_COMMON = {
    uapi.KVM_CAP_USER_MEMORY: 1,
    uapi.KVM_CAP_NR_VCPUS: MAX_VCPUS,
    uapi.KVM_CAP_MAX_VCPUS: MAX_VCPUS,
    uapi.KVM_CAP_MAX_VCPU_ID: MAX_VCPUS,
    uapi.KVM_CAP_NR_MEMSLOTS: KVM_USER_MEM_SLOTS,
    uapi.KVM_CAP_IRQCHIP: 1,
    uapi.KVM_CAP_HLT: 1,
    uapi.KVM_CAP_MP_STATE: 1,
    uapi.KVM_CAP_ASYNC_PF: 1,
    uapi.KVM_CAP_ASYNC_PF_INT: 1,
    uapi.KVM_CAP_SYNC_MMU: 1,
    uapi.KVM_CAP_READONLY_MEM: 1,
    uapi.KVM_CAP_IMMEDIATE_EXIT: 1,
    uapi.KVM_CAP_CHECK_EXTENSION_VM: 1,
}


def check_extension(
    dialect: Dialect, cap: int, *, tdp_enabled: bool = True, has_private_mem: bool | None = None
) -> int:
    """0 for a capability that the dialect does not have.

    ``has_private_mem`` is of the VM that is asked, ``None`` of the system, which answers for any.
    """
    if any(cap == own.number for own in dialect.capabilities):
        return 1
    if cap == uapi.KVM_CAP_USER_MEMORY2:
        return int(has_region2(dialect))
    if not dialect.has_guest_memfd:
        return _COMMON.get(cap, 0)
    match cap:
        case uapi.KVM_CAP_VM_TYPES:
            return vm_types(dialect, tdp_enabled)
        case uapi.KVM_CAP_MEMORY_ATTRIBUTES:
            return kvm_supported_mem_attributes(dialect, has_private_mem is not False)
        case uapi.KVM_CAP_GUEST_MEMFD:
            # A file that cannot be mapped is of use to private memory only.
            return int(dialect.guest_memfd_flags != 0 or has_private_mem is not False)
        case uapi.KVM_CAP_GUEST_MEMFD_FLAGS:
            return kvm_gmem_get_supported_flags(dialect, has_private_mem is True)
    return _COMMON.get(cap, 0)


def vm_types(dialect: Dialect, tdp_enabled: bool) -> int:
    """The types of VM that there are, a bit each (``kvm_is_vm_type_supported``).

    One that has private memory takes two-dimensional paging.
    """
    types = 1 << uapi.KVM_X86_DEFAULT_VM
    if dialect.has_guest_memfd and tdp_enabled:
        types |= 1 << uapi.KVM_X86_SW_PROTECTED_VM
    return types


def has_region2(dialect: Dialect) -> bool:
    """Whether there is KVM_SET_USER_MEMORY_REGION2, for a guest_memfd or for a bitmap."""
    return dialect.has_guest_memfd or dialect.userfault_flag != 0


def valid_slot_flags(
    dialect: Dialect,
    asked: int,
    has_bitmap: bool,
    *,
    region2: bool = False,
    has_private_mem: bool = False,
) -> int:
    """The flags that a memory slot may have if some are asked for (check_memory_region_flags).

    ``has_bitmap`` says that the request is KVM_SET_USER_MEMORY_REGION2's, with a bitmap, and
    ``region2`` that it is that ioctl's in any case: the older one does not take the flags that go
    with what it has no field for.
    """
    flags = uapi.KVM_MEM_LOG_DIRTY_PAGES | uapi.KVM_MEM_READONLY | dialect.slot_flag
    if has_bitmap:
        flags |= dialect.userfault_flag
    if dialect.readonly_excluded and asked & dialect.slot_flag:
        flags &= ~uapi.KVM_MEM_READONLY
    if region2 and (has_private_mem or dialect.guest_memfd_flags):
        flags |= uapi.KVM_MEM_GUEST_MEMFD
        if asked & uapi.KVM_MEM_GUEST_MEMFD:
            # No log is kept of what is private; and a write that a read-only slot refuses is MMIO,
            # which is never private.
            flags &= ~(uapi.KVM_MEM_LOG_DIRTY_PAGES | uapi.KVM_MEM_READONLY)
    return flags


def may_enable(dialect: Dialect, asked: int) -> bool:
    """Whether ``KVM_ENABLE_CAP`` of the dialect's own capability takes ``args[0]``."""
    match dialect.info and dialect.info.enabling:
        case Enabling.OPT_IN:
            return asked in (0, 1)
        case Enabling.OPT_IN_PER_REASON:
            reasons = dialect.flag_unknown | dialect.flag_missing
            return not dialect.checks_reasons or asked & ~reasons == 0
    return False
