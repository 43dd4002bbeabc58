"""The binary interface of what was posted and never merged, beside :mod:`guestfault.uapi`.

Numbers that belong to one dialect only are in its record; here is what needs a type, or is the same
for whoever speaks it.  None of these names means anything to a released kernel, and the numbers do
not either, or mean something else.
"""

from __future__ import annotations

from ctypes import Structure, Union, c_bool, c_uint8, c_uint64
from typing import Final

from guestfault.uapi import kvm as uapi
from guestfault.uapi.ioctl_numbers import _IOWR

__all__ = [
    "KVM_MEM_USERFAULT",
    "KVM_RUN_MEMORY_FAULT_FILLED",
    "KVM_SET_MEM_FAULT_NOWAIT",
    "KVM_SPEC_EXIT_MEMORY_FAULT",
    "KVM_SPEC_EXIT_UNUSED",
    "USERFAULT_BITMAP_PAD",
    "kvm_run_v5",
    "speculative_exit",
]

# v1, 20230215011614.725983-6-amoorthy@google.com
KVM_SET_MEM_FAULT_NOWAIT: Final = _IOWR(uapi.KVMIO, 0xD2, c_bool)

# v5, 20230908222905.1321305-5-amoorthy@google.com
KVM_RUN_MEMORY_FAULT_FILLED: Final = 1 << 8  # of kvm_run.flags
KVM_SPEC_EXIT_UNUSED: Final = 0  # of vcpu->speculative_exit_canary, which is the kernel's own
KVM_SPEC_EXIT_MEMORY_FAULT: Final = 1

# KVM Userfault v3, 20250618042424.330664-1-jthoughton@google.com
KVM_MEM_USERFAULT: Final = 1 << 3  # of kvm_userspace_memory_region2.flags
USERFAULT_BITMAP_PAD: Final = 0  # the word of kvm_userspace_memory_region2.pad2 that it takes


class _memory_fault(Structure):
    _fields_ = [("flags", c_uint64), ("gpa", c_uint64), ("len", c_uint64)]


class _speculative_exit(Union):
    _fields_ = [("memory_fault", _memory_fault), ("padding", c_uint8 * 256)]


class kvm_run_v5(uapi.kvm_run):
    """``struct kvm_run`` with v5's second union behind the synchronised registers.

    It is a :class:`~guestfault.uapi.kvm_run.kvm_run`, and a vCPU's first page has room for it: both
    KVMs give this view of the page.  A released kernel leaves the rest of the page as it is.
    """

    _fields_ = [("speculative_exit", _speculative_exit)]


_SPECULATIVE_EXIT: Final[int] = kvm_run_v5.speculative_exit.offset


def speculative_exit(run_area: memoryview) -> _memory_fault:
    """The ``memory_fault`` of the second union, live, in the area that a vCPU shares."""
    return _memory_fault.from_buffer(run_area, _SPECULATIVE_EXIT)
