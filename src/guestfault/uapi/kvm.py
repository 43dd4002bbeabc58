"""KVM's binary interface on x86: ioctl numbers, structures and flags, under the kernel's own names.

Import this module for the whole interface, as a C program includes one header::

    from guestfault.uapi import kvm as uapi

    uapi.KVM_RUN, uapi.KVM_EXIT_MMIO, uapi.KVM_CAP_IMMEDIATE_EXIT, uapi.kvm_run, uapi.kvm_regs

Here are the VM, its memory and the ioctls.  The page that an exit fills is in
:mod:`~guestfault.uapi.kvm_run`, the exits' numbers in :mod:`~guestfault.uapi.kvm_exit`, the
processor's state in :mod:`~guestfault.uapi.kvm_x86`, the capabilities in
:mod:`~guestfault.uapi.kvm_capabilities`.

The facts come from ``include/uapi/linux/kvm.h``: Linux 6.1, and 6.8 to 7.3 where a comment says so.
Only what was released is here; the numbers of patch series that were not merged as posted belong to
:mod:`guestfault.dialect`.
"""

from __future__ import annotations

from ctypes import Structure, Union, c_uint8, c_uint32, c_uint64, c_void_p
from typing import Final

from guestfault.uapi.ioctl_numbers import _IO, _IOR, _IOW, _IOWR
from guestfault.uapi.kvm_capabilities import *  # noqa: F403
from guestfault.uapi.kvm_exit import *  # noqa: F403
from guestfault.uapi.kvm_run import *  # noqa: F403
from guestfault.uapi.kvm_x86 import *  # noqa: F403
from guestfault.uapi.kvm_x86 import (
    kvm_cpuid2,
    kvm_fpu,
    kvm_msrs,
    kvm_regs,
    kvm_sregs,
    kvm_vcpu_events,
)

KVM_API_VERSION: Final = 12

# kvm_userspace_memory_region.flags
KVM_MEM_LOG_DIRTY_PAGES: Final = 1 << 0
KVM_MEM_READONLY: Final = 1 << 1
KVM_MEM_GUEST_MEMFD: Final = 1 << 2  # 6.8, with kvm_userspace_memory_region2

# kvm_create_guest_memfd.flags (6.18)
GUEST_MEMFD_FLAG_MMAP: Final = 1 << 0
GUEST_MEMFD_FLAG_INIT_SHARED: Final = 1 << 1

# kvm_memory_attributes.attributes (6.8); bits 0 to 2 are kept for read, write and execute
KVM_MEMORY_ATTRIBUTE_PRIVATE: Final = 1 << 3

# The argument of KVM_CREATE_VM, a bit each in the answer to KVM_CAP_VM_TYPES (6.8 and later)
KVM_X86_DEFAULT_VM: Final = 0
KVM_X86_SW_PROTECTED_VM: Final = 1
KVM_X86_SEV_VM: Final = 2
KVM_X86_SEV_ES_VM: Final = 3
KVM_X86_SNP_VM: Final = 4
KVM_X86_TDX_VM: Final = 5

# kvm_mp_state.mp_state
KVM_MP_STATE_RUNNABLE: Final = 0
KVM_MP_STATE_UNINITIALIZED: Final = 1
KVM_MP_STATE_INIT_RECEIVED: Final = 2
KVM_MP_STATE_HALTED: Final = 3
KVM_MP_STATE_SIPI_RECEIVED: Final = 4


class kvm_userspace_memory_region(Structure):
    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
    ]


# Linux 6.8 from here to kvm_memory_attributes; kvm_pre_fault_memory is 6.11.
class kvm_userspace_memory_region2(Structure):
    _fields_ = [
        ("slot", c_uint32),
        ("flags", c_uint32),
        ("guest_phys_addr", c_uint64),
        ("memory_size", c_uint64),
        ("userspace_addr", c_uint64),
        ("guest_memfd_offset", c_uint64),
        ("guest_memfd", c_uint32),
        ("pad1", c_uint32),
        ("pad2", c_uint64 * 14),
    ]


class kvm_create_guest_memfd(Structure):
    _fields_ = [("size", c_uint64), ("flags", c_uint64), ("reserved", c_uint64 * 6)]


class kvm_memory_attributes(Structure):
    _fields_ = [
        ("address", c_uint64),
        ("size", c_uint64),
        ("attributes", c_uint64),
        ("flags", c_uint64),
    ]


class kvm_pre_fault_memory(Structure):
    _fields_ = [
        ("gpa", c_uint64),
        ("size", c_uint64),
        ("flags", c_uint64),
        ("padding", c_uint64 * 5),
    ]


class _dirty_bitmap(Union):
    _fields_ = [("dirty_bitmap", c_void_p), ("padding2", c_uint64)]


class kvm_dirty_log(Structure):
    _anonymous_ = ("_bitmap",)
    _fields_ = [("slot", c_uint32), ("padding1", c_uint32), ("_bitmap", _dirty_bitmap)]


class kvm_clear_dirty_log(Structure):
    _anonymous_ = ("_bitmap",)
    _fields_ = [
        ("slot", c_uint32),
        ("num_pages", c_uint32),
        ("first_page", c_uint64),
        ("_bitmap", _dirty_bitmap),
    ]


class kvm_translation(Structure):
    _fields_ = [
        ("linear_address", c_uint64),
        ("physical_address", c_uint64),
        ("valid", c_uint8),
        ("writeable", c_uint8),
        ("usermode", c_uint8),
        ("pad", c_uint8 * 5),
    ]


class kvm_interrupt(Structure):
    _fields_ = [("irq", c_uint32)]


class kvm_signal_mask(Structure):
    _fields_ = [("len", c_uint32), ("sigset", c_uint8 * 0)]


class kvm_mp_state(Structure):
    _fields_ = [("mp_state", c_uint32)]


class kvm_enable_cap(Structure):
    _fields_ = [
        ("cap", c_uint32),
        ("flags", c_uint32),
        ("args", c_uint64 * 4),
        ("pad", c_uint8 * 64),
    ]


KVMIO: Final = 0xAE

# On /dev/kvm
KVM_GET_API_VERSION: Final = _IO(KVMIO, 0x00)
KVM_CREATE_VM: Final = _IO(KVMIO, 0x01)
KVM_CHECK_EXTENSION: Final = _IO(KVMIO, 0x03)  # on a VM too
KVM_GET_VCPU_MMAP_SIZE: Final = _IO(KVMIO, 0x04)
KVM_GET_SUPPORTED_CPUID: Final = _IOWR(KVMIO, 0x05, kvm_cpuid2)

# On a VM
KVM_CREATE_VCPU: Final = _IO(KVMIO, 0x41)
KVM_GET_DIRTY_LOG: Final = _IOW(KVMIO, 0x42, kvm_dirty_log)
KVM_SET_USER_MEMORY_REGION: Final = _IOW(KVMIO, 0x46, kvm_userspace_memory_region)
KVM_SET_TSS_ADDR: Final = _IO(KVMIO, 0x47)
KVM_SET_IDENTITY_MAP_ADDR: Final = _IOW(KVMIO, 0x48, c_uint64)
KVM_SET_USER_MEMORY_REGION2: Final = _IOW(KVMIO, 0x49, kvm_userspace_memory_region2)
KVM_CREATE_IRQCHIP: Final = _IO(KVMIO, 0x60)
KVM_ENABLE_CAP: Final = _IOW(KVMIO, 0xA3, kvm_enable_cap)  # on a vCPU too
KVM_CLEAR_DIRTY_LOG: Final = _IOWR(KVMIO, 0xC0, kvm_clear_dirty_log)
KVM_SET_MEMORY_ATTRIBUTES: Final = _IOW(KVMIO, 0xD2, kvm_memory_attributes)
KVM_CREATE_GUEST_MEMFD: Final = _IOWR(KVMIO, 0xD4, kvm_create_guest_memfd)

# On a vCPU
KVM_RUN: Final = _IO(KVMIO, 0x80)
KVM_GET_REGS: Final = _IOR(KVMIO, 0x81, kvm_regs)
KVM_SET_REGS: Final = _IOW(KVMIO, 0x82, kvm_regs)
KVM_GET_SREGS: Final = _IOR(KVMIO, 0x83, kvm_sregs)
KVM_SET_SREGS: Final = _IOW(KVMIO, 0x84, kvm_sregs)
KVM_TRANSLATE: Final = _IOWR(KVMIO, 0x85, kvm_translation)
KVM_INTERRUPT: Final = _IOW(KVMIO, 0x86, kvm_interrupt)
KVM_GET_MSRS: Final = _IOWR(KVMIO, 0x88, kvm_msrs)
KVM_SET_MSRS: Final = _IOW(KVMIO, 0x89, kvm_msrs)
KVM_SET_SIGNAL_MASK: Final = _IOW(KVMIO, 0x8B, kvm_signal_mask)
KVM_GET_FPU: Final = _IOR(KVMIO, 0x8C, kvm_fpu)
KVM_SET_FPU: Final = _IOW(KVMIO, 0x8D, kvm_fpu)
KVM_SET_CPUID2: Final = _IOW(KVMIO, 0x90, kvm_cpuid2)
KVM_GET_CPUID2: Final = _IOWR(KVMIO, 0x91, kvm_cpuid2)
KVM_GET_MP_STATE: Final = _IOR(KVMIO, 0x98, kvm_mp_state)
KVM_SET_MP_STATE: Final = _IOW(KVMIO, 0x99, kvm_mp_state)
KVM_NMI: Final = _IO(KVMIO, 0x9A)
KVM_GET_VCPU_EVENTS: Final = _IOR(KVMIO, 0x9F, kvm_vcpu_events)
KVM_SET_VCPU_EVENTS: Final = _IOW(KVMIO, 0xA0, kvm_vcpu_events)
KVM_PRE_FAULT_MEMORY: Final = _IOWR(KVMIO, 0xD5, kvm_pre_fault_memory)
