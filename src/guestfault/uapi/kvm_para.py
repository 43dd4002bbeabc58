"""KVM's paravirtual interface of the guest, as far as asynchronous page faults go.

The facts come from ``arch/x86/include/uapi/asm/kvm_para.h`` of Linux 6.1.  The feature bits are of
EAX of CPUID leaf ``KVM_CPUID_FEATURES``, which userspace gives the guest.
"""

from __future__ import annotations

from ctypes import Structure, c_uint8, c_uint32
from typing import Final

KVM_CPUID_SIGNATURE: Final = 0x4000_0000
KVM_CPUID_FEATURES: Final = 0x4000_0001

KVM_FEATURE_ASYNC_PF: Final = 4
KVM_FEATURE_ASYNC_PF_VMEXIT: Final = 10
KVM_FEATURE_ASYNC_PF_INT: Final = 14

MSR_KVM_ASYNC_PF_EN: Final = 0x4B56_4D02
MSR_KVM_ASYNC_PF_INT: Final = 0x4B56_4D06
MSR_KVM_ASYNC_PF_ACK: Final = 0x4B56_4D07

# In MSR_KVM_ASYNC_PF_EN, whose bits from 6 on are the address of struct kvm_vcpu_pv_apf_data
KVM_ASYNC_PF_ENABLED: Final = 1 << 0
KVM_ASYNC_PF_SEND_ALWAYS: Final = 1 << 1
KVM_ASYNC_PF_DELIVERY_AS_PF_VMEXIT: Final = 1 << 2
KVM_ASYNC_PF_DELIVERY_AS_INT: Final = 1 << 3

KVM_PV_REASON_PAGE_NOT_PRESENT: Final = 1
KVM_PV_REASON_PAGE_READY: Final = 2


class kvm_vcpu_pv_apf_data(Structure):
    _fields_ = [
        ("flags", c_uint32),  # of a #PF that says "page not present"
        ("token", c_uint32),  # of the interrupt that says "page ready"
        ("pad", c_uint8 * 56),
        ("enabled", c_uint32),  # the guest's own, until Linux 6.7
    ]
