"""KVM's own accesses to guest memory: ``kvm_vcpu_read_guest_page`` and its like.

The emulator's operands and code, the guest page tables that it walks, descriptors and vectors: all
of it KVM reads and writes by ``copy_from_user`` and ``copy_to_user`` on the slot's host address.
No second-stage entry is involved, no fault of the guest's is handled, and where the copy fails
there is -EFAULT for the caller alone, who mostly goes on as if there were no memory.  That is where
the versions of the interface that annotate these functions (v3 to v5) fill ``kvm_run`` for an error
that userspace never gets to see; the seed thread's hazards begin here.

A slot's flag to exit on a missing page does not count here: these copies sleep in userfaultfd.
"""

from __future__ import annotations

import functools

from guestfault.dialect.record import Site
from guestfault.softkvm.efault import kvm_handle_efault
from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.memslots import KVM_MEMSLOT_INVALID, PAGE_SIZE, KvmMemorySlot
from guestfault.softkvm.paging_tmpl import GuestWalker, walk_addr
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.refusal import GuestException
from guestfault.uapi import kvm as uapi
from guestfault.x86.paging import AccessKind, PageFault, Translation, walk_from
from guestfault.x86.registers import GP_VECTOR, PF_VECTOR

__all__ = [
    "NOT_WRITABLE",
    "copy_from_guest_page",
    "copy_to_guest_page",
    "kvm_fetch_guest_virt",
    "kvm_mmu_gva_to_gpa",
    "kvm_read_guest_virt_helper",
    "kvm_vcpu_gfn_to_memslot",
    "kvm_vcpu_read_guest_page",
    "kvm_vcpu_write_guest_page",
    "kvm_write_guest_virt_helper",
]

_PAGE, _OFFSET = -PAGE_SIZE, PAGE_SIZE - 1
NOT_WRITABLE = uapi.KVM_MEM_READONLY | KVM_MEMSLOT_INVALID
_READ, _FETCH = AccessKind.READ, AccessKind.FETCH


def kvm_vcpu_gfn_to_memslot(vcpu: KvmVcpu, gfn: int) -> KvmMemorySlot | None:
    """The slot that holds a frame."""
    preemption_point("kvm_vcpu_gfn_to_memslot: find the slot", "memslots")
    return vcpu.kvm.memslots.gfn_to_memslot(gfn)


def kvm_vcpu_read_guest_page(vcpu: KvmVcpu, gpa: int, size: int) -> bytes | None:
    """Read inside one page; ``None`` for -EFAULT."""
    data = copy_from_guest_page(vcpu, gpa, size)
    if data is None:
        kvm_handle_efault(vcpu, Site.VCPU_READ_GUEST_PAGE, gpa, size)
    return data


def kvm_vcpu_write_guest_page(vcpu: KvmVcpu, gpa: int, data: bytes) -> bool:
    """Write inside one page; ``False`` for -EFAULT.  A read-only slot is no memory to write."""
    if copy_to_guest_page(vcpu, gpa, data):
        return True
    kvm_handle_efault(vcpu, Site.VCPU_WRITE_GUEST_PAGE, gpa, len(data), write=True)
    return False


def copy_from_guest_page(vcpu: KvmVcpu, gpa: int, size: int) -> bytes | None:
    """The same without an annotation, as the walk of the guest's tables reads (``__get_user``)."""
    preemption_point("kvm_vcpu_gfn_to_memslot: find the slot", "memslots")
    kvm = vcpu.kvm
    slot = kvm.memslots.gfn_to_memslot(gpa >> 12)
    if slot is None or slot.flags & KVM_MEMSLOT_INVALID:
        return None
    hva = slot.userspace_addr + gpa - slot.base_gfn * PAGE_SIZE
    preemption_point("kvm_vcpu_read_guest_page: copy_from_user", ("page", hva & _PAGE))
    return kvm.mm.copy_from_user(hva, size)


def copy_to_guest_page(vcpu: KvmVcpu, gpa: int, data: bytes) -> bool:
    """The same for a write; the page is dirty then."""
    gfn = gpa >> 12
    slot = kvm_vcpu_gfn_to_memslot(vcpu, gfn)
    if slot is None or slot.flags & NOT_WRITABLE:
        return False
    hva = slot.hva_of_gfn(gfn) + (gpa & _OFFSET)
    preemption_point("kvm_vcpu_write_guest_page: copy_to_user", ("page", hva & _PAGE), True)
    if not vcpu.kvm.mm.copy_to_user(hva, data):
        return False
    if slot.dirty_bitmap:
        preemption_point("mark_page_dirty_in_slot: set the bit", "mmu", True)
        with vcpu.kvm.second_stage.mmu_lock:
            slot.mark_page_dirty(gfn)
    return True


# -- linear addresses ------------------------------------------------------------------------------


def kvm_mmu_gva_to_gpa(
    vcpu: KvmVcpu, gva: int, kind: AccessKind, *, system: bool = False
) -> int | GuestException:
    """Walk the guest's tables in software (``FNAME(gva_to_gpa)``): the gpa, or the exception.

    ``system``: an access of the processor's own, at any privilege level.
    """
    found = walk_addr(vcpu, gva, kind, vcpu.cpl == 3, ac=vcpu.smap_ac, implicit=system)
    if isinstance(found, GuestWalker):
        return found.gpa
    if isinstance(found, PageFault):
        return GuestException(PF_VECTOR, found.error_code, found.gva)
    return GuestException(GP_VECTOR, 0)


def _read_gpte(vcpu: KvmVcpu, gpa: int, size: int) -> int | None:
    data = copy_from_guest_page(vcpu, gpa, size)
    return None if data is None else int.from_bytes(data, "little")


def kvm_fetch_guest_virt(vcpu: KvmVcpu, gva: int, size: int) -> bytes | GuestException | None:
    """Read code inside one page; an exception for the guest, or ``None`` for X86EMUL_IO_NEEDED.

    The processor has just walked to this code.  So it is enough to look at the last table again,
    where the kernel walks from the root.
    """
    shift = vcpu.table_shift
    table = vcpu.tables.get(gva >> shift) if shift else None
    if table is not None:
        user, read_gpte = vcpu.cpl == 3, functools.partial(_read_gpte, vcpu)
        found = walk_from(vcpu.paging, table, gva, _FETCH, user, read_gpte, ac=vcpu.smap_ac)
        if type(found) is Translation and not found.updates:
            return kvm_vcpu_read_guest_page(vcpu, found.gpa, size)
    return kvm_read_guest_virt_helper(vcpu, gva, size, _FETCH)


def kvm_read_guest_virt_helper(
    vcpu: KvmVcpu, gva: int, size: int, kind: AccessKind = _READ, *, system: bool = False
) -> bytes | GuestException | None:
    """Read at a linear address, with no thought of MMIO; the results are those of a fetch."""
    parts = b""
    while size:
        n = min(size, PAGE_SIZE - (gva & _OFFSET))
        gpa = kvm_mmu_gva_to_gpa(vcpu, gva, kind, system=system)
        if isinstance(gpa, GuestException):
            return gpa
        data = kvm_vcpu_read_guest_page(vcpu, gpa, n)
        if data is None:
            return None
        parts += data
        gva, size = gva + n, size - n
    return parts


def kvm_write_guest_virt_helper(vcpu: KvmVcpu, gva: int, data: bytes) -> GuestException | bool:
    """Write for the processor itself; an exception for the guest, or whether it is written."""
    while data:
        n = min(len(data), PAGE_SIZE - (gva & _OFFSET))
        gpa = kvm_mmu_gva_to_gpa(vcpu, gva, AccessKind.WRITE, system=True)
        if isinstance(gpa, GuestException):
            return gpa
        if not kvm_vcpu_write_guest_page(vcpu, gpa, data[:n]):
            return False
        gva, data = gva + n, data[n:]
    return True
