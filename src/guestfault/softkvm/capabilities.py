"""What ``KVM_CHECK_EXTENSION`` answers in software: common to all dialects, and each one's own."""

from __future__ import annotations

from guestfault.dialect.record import Dialect, Enabling
from guestfault.softkvm.memslots import KVM_USER_MEM_SLOTS
from guestfault.uapi import kvm as uapi

__all__ = ["MAX_VCPUS", "check_extension", "may_enable", "valid_slot_flags"]

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


def check_extension(dialect: Dialect, cap: int) -> int:
    """0 for a capability that the dialect does not have."""
    if any(cap == own.number for own in dialect.capabilities):
        return 1
    if cap == uapi.KVM_CAP_USER_MEMORY2:
        return int(dialect.userfault_flag != 0)  # the ioctl by which a bitmap is given
    return _COMMON.get(cap, 0)


def valid_slot_flags(dialect: Dialect, asked: int, has_bitmap: bool) -> int:
    """The flags that a memory slot may have if some are asked for (check_memory_region_flags).

    ``has_bitmap`` says that the request is KVM_SET_USER_MEMORY_REGION2's, with a bitmap: the older
    ioctl does not take the flag that goes with it.
    """
    flags = uapi.KVM_MEM_LOG_DIRTY_PAGES | uapi.KVM_MEM_READONLY | dialect.slot_flag
    if has_bitmap:
        flags |= dialect.userfault_flag
    if dialect.readonly_excluded and asked & dialect.slot_flag:
        flags &= ~uapi.KVM_MEM_READONLY
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
