"""A fault in memory of two kinds: which it wants, and what comes of it (arch/x86/kvm/mmu/mmu.c).

Hardware that protects a guest tells KVM whether an access is to private memory
(``PFERR_PRIVATE_ACCESS``).  For a VM of type ``KVM_X86_SW_PROTECTED_VM`` nobody says it, and the
frame's attribute decides: :func:`private_access` asks it as the fault begins.  The fault path
asks it again before it takes a page (:func:`faultin_pfn_of_two`); where the two differ userspace
is told what the access wanted, which for this type of VM is what the attribute *was*: a mismatch
is a conversion under way, and the exit tells the older attribute.

A private fault takes its page from the slot's guest_memfd (:func:`kvm_mmu_faultin_pfn_gmem`); with
no slot, no file, or a file that is gone it fails.  It is never MMIO, and KVM's emulator has nothing
to do with it.  All of these exits are annotated: here, and nowhere else, merged kernels fill
``kvm_run.memory_fault``.
"""

from __future__ import annotations

import errno

from guestfault.dialect.record import Site
from guestfault.softkvm.efault import kvm_handle_efault
from guestfault.softkvm.guest_memfd import kvm_gmem_get_pfn
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.mem_attributes import kvm_mem_is_private
from guestfault.softkvm.memslots import KVM_MEMSLOT_INVALID, PAGE_SIZE
from guestfault.softkvm.mmu_internal import KvmPageFault, RetPf
from guestfault.uapi import kvm as uapi
from guestfault.x86.registers import PFERR_PRIVATE_ACCESS, PFERR_RSVD_MASK

__all__ = [
    "faultin_pfn_of_two",
    "kvm_mmu_faultin_pfn_gmem",
    "kvm_mmu_prepare_memory_fault_exit",
    "private_access",
    "private_emulation",
]


def private_access(vcpu: KvmVcpu, gpa: int, error_code: int) -> int:
    """The error code, with ``PFERR_PRIVATE_ACCESS`` if the frame is private just now.

    The VM has private memory.  A fault on an MMIO entry is left alone in ``kvm_mmu_page_fault``:
    emulated MMIO is shared.
    """
    if error_code & PFERR_RSVD_MASK and vcpu.kvm.dialect.private_in_error_code:
        return error_code
    if kvm_mem_is_private(vcpu.kvm, gpa >> 12):
        return error_code | PFERR_PRIVATE_ACCESS
    return error_code


def kvm_mmu_prepare_memory_fault_exit(
    vcpu: KvmVcpu, fault: KvmPageFault, site: Site, r: int = -errno.EFAULT
) -> int:
    """Tell userspace of the frame, and whether the access was to be private: what to return."""
    return kvm_handle_efault(
        vcpu,
        site,
        fault.gfn << 12,
        PAGE_SIZE,
        write=fault.write,
        exec_=fault.exec,
        private=fault.is_private,
        r=r,
    )


def faultin_pfn_of_two(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """The part of ``kvm_mmu_faultin_pfn`` that is for VMs with a guest_memfd, or private memory.

    INVALID for a fault that goes on as any other: it is shared, and the slot's address serves it.
    """
    kvm, slot = vcpu.kvm, fault.slot
    if kvm.has_private_mem and fault.is_private != kvm_mem_is_private(kvm, fault.gfn):
        site = Site.FAULTIN_PFN_PRIVATE_MISMATCH
        return kvm_mmu_prepare_memory_fault_exit(vcpu, fault, site)
    if slot is None:
        return _private_noslot_fault(vcpu, fault) if fault.is_private else RetPf.INVALID
    if slot.flags & KVM_MEMSLOT_INVALID or not (slot.gmem_only or fault.is_private):
        return RetPf.INVALID
    return kvm_mmu_faultin_pfn_gmem(vcpu, fault)


def _private_noslot_fault(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """A private access to a frame that no slot holds, which is no MMIO.

    ``kvm_handle_noslot_fault`` sees to it since Linux 6.10; before, such a fault came on to where a
    slot without a file ends.
    """
    site = Site.HANDLE_NOSLOT_FAULT
    if site not in vcpu.kvm.dialect.annotated:
        site = Site.FAULTIN_PFN_GMEM
    return kvm_mmu_prepare_memory_fault_exit(vcpu, fault, site)


def private_emulation(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """A private access that would have to be emulated: -EFAULT where it is looked for, or EMULATE.

    Nothing comes here: what is emulated is MMIO, a write to a read-only slot, and one to a frame
    that is tracked.
    """
    site = Site.DO_PAGE_FAULT_PRIVATE
    if site not in vcpu.kvm.dialect.annotated:
        return RetPf.EMULATE
    return kvm_mmu_prepare_memory_fault_exit(vcpu, fault, site)


def kvm_mmu_faultin_pfn_gmem(vcpu: KvmVcpu, fault: KvmPageFault) -> int:
    """Take the page from the slot's guest_memfd: CONTINUE with it, or a negative errno.

    (``kvm_faultin_pfn_private`` before a file could serve shared faults, too.)
    """
    slot, site = fault.slot, Site.FAULTIN_PFN_GMEM
    if slot is None or slot.gmem is None:
        return kvm_mmu_prepare_memory_fault_exit(vcpu, fault, site)
    r, pfn = kvm_gmem_get_pfn(vcpu.kvm, slot, fault.gfn)
    if r < 0:
        return kvm_mmu_prepare_memory_fault_exit(vcpu, fault, site, r)
    fault.pfn, fault.map_writable = pfn, not slot.flags & uapi.KVM_MEM_READONLY
    return RetPf.CONTINUE
