"""KVM Userfault: a bitmap in userspace says which pages may not be touched yet.

The successor that was posted for the slot flag of the seed's series (``KVM_MEM_USERFAULT``, KVM
Userfault v3, 20250618042424.330664-1-jthoughton@google.com).  There, a page was missing when fast
GUP failed, which depends on all that the host does with its memory.  Here userspace says it: one
bit for each page of the slot, at ``userfault_bitmap`` in its own memory.  A guest's fault on a page
whose bit is set is an exit, annotated with a flag of its own; userspace fetches the page, clears
the bit and lets the vCPU run.

KVM reads the bitmap as it would any user memory, at each fault and without a lock.  What follows:

- A word that cannot be read fails the fault, as *bare* -EFAULT.
- A bit that is cleared in time is seen; one that is cleared just too late costs an exit for a page
  that is there, and the vCPU comes back.
- A bit that is *set* has no effect on a page that is mapped already.  Enabling the flag zaps what
  is mapped (:func:`guestfault.softkvm.set_memslot.kvm_mmu_slot_apply_flags`); afterwards userspace
  sets no bit of a page in use.
- Only faults are caught.  What KVM itself reads and writes for the guest, in emulation or for its
  clocks, goes to the host address (:mod:`guestfault.softkvm.guest_access`) and never comes here:
  userfaultfd is still needed for that.
"""

from __future__ import annotations

from guestfault.dialect.record import Reason, Site
from guestfault.softkvm.efault import kvm_handle_efault
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.mmu_internal import KvmPageFault
from guestfault.softkvm.second_stage import PAGE_SIZE

__all__ = ["kvm_do_userfault"]

_WORD = 8


def kvm_do_userfault(vcpu: KvmVcpu, fault: KvmPageFault) -> bool:
    """Whether the fault ends with -EFAULT because of the bitmap."""
    slot = fault.slot
    if slot is None or not slot.flags & vcpu.kvm.userfault_flag:
        return False
    index = fault.gfn - slot.base_gfn
    at = slot.userfault_bitmap + index // (8 * _WORD) * _WORD
    word = vcpu.kvm.mm.copy_from_user(at, _WORD)
    if word is None:
        return True
    if not int.from_bytes(word, "little") >> index % (8 * _WORD) & 1:
        return False
    kvm_handle_efault(
        vcpu,
        Site.DO_USERFAULT,
        fault.gfn << 12,
        PAGE_SIZE,
        write=fault.write,
        exec_=fault.exec,
        reason=Reason.USERFAULT,
    )
    return True
