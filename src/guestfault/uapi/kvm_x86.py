"""KVM's structures of the x86 processor: registers, segments, CPUID, MSRs, pending events.

The facts come from ``arch/x86/include/uapi/asm/kvm.h`` of Linux 6.1.  A structure that ends in a
flexible array declares it with length 0: its size is then the one in the ioctl's number.
:func:`flexible` gives the type that has room for entries.
"""

from __future__ import annotations

from ctypes import Structure, c_uint8, c_uint16, c_uint32, c_uint64
from typing import Any, Final, TypeVar, cast

_S = TypeVar("_S", bound=Structure)


def flexible(structure: type[_S], count: int) -> type[_S]:
    """The type of a ``structure`` whose last field, a flexible array, has ``count`` entries.

    >>> cpuid = flexible(kvm_cpuid2, 100)()
    >>> cpuid.nent = len(cpuid.entries)
    """
    name, array = structure._fields_[-1][:2]
    entry = cast(Any, array)._type_
    # A derived structure's fields follow the base's: the entries lie where the empty array does.
    return type(structure.__name__, (structure,), {"_fields_": [(name, entry * count)]})


KVM_NR_INTERRUPTS: Final = 256


class kvm_regs(Structure):
    _fields_ = [
        (name, c_uint64)
        for name in (
            *("rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rsp", "rbp"),
            *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
            *("rip", "rflags"),
        )
    ]


class kvm_segment(Structure):
    _fields_ = [
        ("base", c_uint64),
        ("limit", c_uint32),
        ("selector", c_uint16),
        ("type", c_uint8),
        ("present", c_uint8),
        ("dpl", c_uint8),
        ("db", c_uint8),
        ("s", c_uint8),
        ("l", c_uint8),
        ("g", c_uint8),
        ("avl", c_uint8),
        ("unusable", c_uint8),
        ("padding", c_uint8),
    ]


class kvm_dtable(Structure):
    _fields_ = [("base", c_uint64), ("limit", c_uint16), ("padding", c_uint16 * 3)]


class kvm_sregs(Structure):
    _fields_ = [
        *((name, kvm_segment) for name in ("cs", "ds", "es", "fs", "gs", "ss", "tr", "ldt")),
        ("gdt", kvm_dtable),
        ("idt", kvm_dtable),
        *((name, c_uint64) for name in ("cr0", "cr2", "cr3", "cr4", "cr8")),
        ("efer", c_uint64),
        ("apic_base", c_uint64),
        ("interrupt_bitmap", c_uint64 * ((KVM_NR_INTERRUPTS + 63) // 64)),
    ]


class kvm_fpu(Structure):
    _fields_ = [
        ("fpr", c_uint8 * 16 * 8),
        ("fcw", c_uint16),
        ("fsw", c_uint16),
        ("ftwx", c_uint8),
        ("pad1", c_uint8),
        ("last_opcode", c_uint16),
        ("last_ip", c_uint64),
        ("last_dp", c_uint64),
        ("xmm", c_uint8 * 16 * 16),
        ("mxcsr", c_uint32),
        ("pad2", c_uint32),
    ]


class kvm_msr_entry(Structure):
    _fields_ = [("index", c_uint32), ("reserved", c_uint32), ("data", c_uint64)]


class kvm_msrs(Structure):
    _fields_ = [("nmsrs", c_uint32), ("pad", c_uint32), ("entries", kvm_msr_entry * 0)]


class kvm_cpuid_entry2(Structure):
    _fields_ = [
        *((name, c_uint32) for name in ("function", "index", "flags", "eax", "ebx", "ecx", "edx")),
        ("padding", c_uint32 * 3),
    ]


class kvm_cpuid2(Structure):
    _fields_ = [("nent", c_uint32), ("padding", c_uint32), ("entries", kvm_cpuid_entry2 * 0)]


KVM_CPUID_FLAG_SIGNIFCANT_INDEX: Final = 1 << 0  # the header's spelling


class kvm_debug_exit_arch(Structure):
    _fields_ = [
        ("exception", c_uint32),
        ("pad", c_uint32),
        ("pc", c_uint64),
        ("dr6", c_uint64),
        ("dr7", c_uint64),
    ]


class _exception(Structure):
    _fields_ = [
        ("injected", c_uint8),
        ("nr", c_uint8),
        ("has_error_code", c_uint8),
        ("pending", c_uint8),
        ("error_code", c_uint32),
    ]


class _interrupt(Structure):
    _fields_ = [
        ("injected", c_uint8),
        ("nr", c_uint8),
        ("soft", c_uint8),
        ("shadow", c_uint8),
    ]


class _nmi(Structure):
    _fields_ = [
        ("injected", c_uint8),
        ("pending", c_uint8),
        ("masked", c_uint8),
        ("pad", c_uint8),
    ]


class _smi(Structure):
    _fields_ = [
        ("smm", c_uint8),
        ("pending", c_uint8),
        ("smm_inside_nmi", c_uint8),
        ("latched_init", c_uint8),
    ]


class _triple_fault(Structure):
    _fields_ = [("pending", c_uint8)]


class kvm_vcpu_events(Structure):
    _fields_ = [
        ("exception", _exception),
        ("interrupt", _interrupt),
        ("nmi", _nmi),
        ("sipi_vector", c_uint32),
        ("flags", c_uint32),
        ("smi", _smi),
        ("triple_fault", _triple_fault),
        ("reserved", c_uint8 * 26),
        ("exception_has_payload", c_uint8),
        ("exception_payload", c_uint64),
    ]


KVM_VCPUEVENT_VALID_NMI_PENDING: Final = 0x01
KVM_VCPUEVENT_VALID_SIPI_VECTOR: Final = 0x02
KVM_VCPUEVENT_VALID_SHADOW: Final = 0x04
KVM_VCPUEVENT_VALID_SMM: Final = 0x08
KVM_VCPUEVENT_VALID_PAYLOAD: Final = 0x10
KVM_VCPUEVENT_VALID_TRIPLE_FAULT: Final = 0x20


class kvm_sync_regs(Structure):
    _fields_ = [("regs", kvm_regs), ("sregs", kvm_sregs), ("events", kvm_vcpu_events)]


KVM_SYNC_X86_REGS: Final = 1 << 0
KVM_SYNC_X86_SREGS: Final = 1 << 1
KVM_SYNC_X86_EVENTS: Final = 1 << 2
KVM_SYNC_X86_VALID_FIELDS: Final = KVM_SYNC_X86_REGS | KVM_SYNC_X86_SREGS | KVM_SYNC_X86_EVENTS
