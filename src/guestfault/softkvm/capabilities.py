"""What ``KVM_CHECK_EXTENSION`` answers in software: common to all dialects, and each one's own."""

from __future__ import annotations

from guestfault.dialect.record import Dialect
from guestfault.softkvm.memslots import KVM_USER_MEM_SLOTS
from guestfault.uapi import kvm as uapi

__all__ = ["MAX_VCPUS", "check_extension", "valid_slot_flags"]

MAX_VCPUS = 4096

_COMMON = {
    uapi.KVM_CAP_USER_MEMORY: 1,
    uapi.KVM_CAP_NR_VCPUS: MAX_VCPUS,
    uapi.KVM_CAP_MAX_VCPUS: MAX_VCPUS,
    uapi.KVM_CAP_MAX_VCPU_ID: MAX_VCPUS,
    uapi.KVM_CAP_NR_MEMSLOTS: KVM_USER_MEM_SLOTS,
    uapi.KVM_CAP_SYNC_MMU: 1,
    uapi.KVM_CAP_READONLY_MEM: 1,
    uapi.KVM_CAP_IMMEDIATE_EXIT: 1,
    uapi.KVM_CAP_CHECK_EXTENSION_VM: 1,
}


def check_extension(dialect: Dialect, cap: int) -> int:
    """0 for a capability that the dialect does not have."""
    if cap == dialect.interface.cap or (dialect.missing and cap == dialect.missing.cap):
        return 1
    return _COMMON.get(cap, 0)


def valid_slot_flags(dialect: Dialect) -> int:
    """The flags that a memory slot may have."""
    flags = uapi.KVM_MEM_LOG_DIRTY_PAGES | uapi.KVM_MEM_READONLY
    return flags | (dialect.missing.slot_flag if dialect.missing else 0)
