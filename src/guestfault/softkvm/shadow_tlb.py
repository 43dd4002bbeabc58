"""The processor on shadow pages: its look-up, the fault where that fails, and its own accesses.

On a TLB miss the processor walks the shadow pages.  Where they do not permit the access it raises a
page fault, which KVM intercepts (:func:`kvm_handle_page_fault`): it is the guest's own if the
guest's tables do not permit the access either, and else KVM's to resolve, unseen by the guest.

What the processor reads and writes for itself (descriptor tables, the stack of an exception) takes
the same road.
"""

from __future__ import annotations

from guestfault.softkvm.kvm_host import KvmVcpu
from guestfault.softkvm.mmu import kvm_mmu_page_fault
from guestfault.softkvm.paging_tmpl import PFERR_IMPLICIT_ACCESS
from guestfault.softkvm.preempt import preemption_point
from guestfault.softkvm.refusal import AccessFailed, Emulate, Exit, GuestException
from guestfault.softkvm.second_stage import SPTE_MMIO
from guestfault.softkvm.shadow import kvm_mmu_unprotect_page
from guestfault.softkvm.shadow_context import kvm_mmu_reload, kvm_mmu_zap_gfn
from guestfault.softkvm.shadow_page import SPTE_ADDRESS_MASK, KvmMmu
from guestfault.x86.access_kind import AccessKind
from guestfault.x86.registers import (
    GP_VECTOR,
    PFERR_FETCH_MASK,
    PFERR_PRESENT_MASK,
    PFERR_RSVD_MASK,
    PFERR_USER_MASK,
    PFERR_WRITE_MASK,
)

__all__ = ["read_linear", "shadow_entry", "write_linear"]

_OFFSET = 0xFFF
_LINEAR_MASK, _U32 = (1 << 64) - 1, (1 << 32) - 1
_WRITE = AccessKind.WRITE
_ERROR_CODE = {
    AccessKind.READ: 0,
    AccessKind.WRITE: PFERR_WRITE_MASK,
    AccessKind.FETCH: PFERR_FETCH_MASK,
}


def shadow_entry(
    vcpu: KvmVcpu, gva: int, kind: AccessKind, *, implicit: bool = False
) -> tuple[int, int] | None:
    """(entry, guest frame) for an access that may go ahead, or ``None`` and ``vcpu.refusal``.

    An Emulate has the access's guest physical address.
    """
    user = vcpu.cpl == 3 and not implicit
    while True:
        r = kvm_mmu_reload(vcpu)
        if r:
            vcpu.refusal = Exit(r)
            return None
        mmu = vcpu.mmu
        assert mmu is not None
        bits = vcpu.paging.linear_bits
        if bits == 32:
            gva &= 0xFFFF_FFFF
        elif (gva + (1 << bits - 1) & _LINEAR_MASK) >> bits:
            vcpu.refusal = GuestException(GP_VECTOR, 0)
            return None
        preemption_point("guest: walk the shadow pages", "mmu")
        spte, gfn = mmu.look_up(gva)
        ac = vcpu.smap_ac and not implicit
        if mmu.permits(spte, kind, user, ac):
            return spte, gfn
        code = _ERROR_CODE[kind]
        if spte & SPTE_MMIO:
            # The processor reports the reserved bit, and KVM's emulator then checks the rights.
            if mmu.permits_mmio(spte, kind, user, ac):
                code |= PFERR_PRESENT_MASK | PFERR_RSVD_MASK
        elif spte:
            code |= PFERR_PRESENT_MASK
        code |= PFERR_USER_MASK if user else PFERR_IMPLICIT_ACCESS if implicit else 0
        mmu.fault_gpa = None
        if not kvm_handle_page_fault(vcpu, code, gva):
            injected, mmu.injected = mmu.injected, None
            refusal = vcpu.refusal
            if injected is not None:
                vcpu.refusal = injected
            elif isinstance(refusal, Emulate):
                gpa = _emulated_gpa(vcpu, mmu, gva)
                vcpu.refusal = Emulate(gpa, kind, refusal.error_code & _U32, refusal.address)
            return None


def _emulated_gpa(vcpu: KvmVcpu, mmu: KvmMmu, gva: int) -> int:
    """Where the access goes: as the walk has it, or without one, as the vCPU remembers it."""
    if mmu.fault_gpa is not None:
        return mmu.fault_gpa
    assert vcpu.mmio is not None
    return vcpu.mmio.gfn << 12 | gva & _OFFSET


def kvm_handle_page_fault(vcpu: KvmVcpu, error_code: int, fault_address: int) -> bool:
    """The processor's page fault, intercepted: whether it may make its access again at once.

    (A kernel of 32 bits returns -EFAULT here for an address of more.)
    """
    return kvm_mmu_page_fault(vcpu, fault_address, error_code)


# -- accesses of the processor's own, inside one page ----------------------------------------------


def read_linear(
    vcpu: KvmVcpu, gva: int, size: int, kind: AccessKind, *, implicit: bool = False
) -> bytes:
    """Read; raises :class:`AccessFailed`."""
    while True:
        hva, gfn = _find(vcpu, gva, kind, implicit)
        data = vcpu.kvm.mm.copy_from_user(hva, size)
        if data is not None:
            return data
        _drop(vcpu, gfn)


def write_linear(vcpu: KvmVcpu, gva: int, data: bytes, *, implicit: bool = False) -> None:
    """Write; raises :class:`AccessFailed`.  With no data, make sure that it would succeed."""
    while True:
        hva, gfn = _find(vcpu, gva, _WRITE, implicit)
        if not data or vcpu.kvm.mm.copy_to_user(hva, data):
            return
        _drop(vcpu, gfn)


def _find(vcpu: KvmVcpu, gva: int, kind: AccessKind, implicit: bool) -> tuple[int, int]:
    found = shadow_entry(vcpu, gva, kind, implicit=implicit)
    if found is None and kind is _WRITE and _unprotect(vcpu):
        found = shadow_entry(vcpu, gva, kind, implicit=implicit)
    if found is None:
        raise AccessFailed(vcpu.refusal)
    spte, gfn = found
    return (spte & SPTE_ADDRESS_MASK) + (gva & _OFFSET), gfn


def _unprotect(vcpu: KvmVcpu) -> bool:
    """``kvm_mmu_unprotect_page_virt``: make a frame that holds a page table memory like any other.

    So for the stack of an exception in such a frame: there is no instruction to emulate.
    """
    refusal = vcpu.refusal
    return isinstance(refusal, Emulate) and kvm_mmu_unprotect_page(vcpu.kvm, refusal.gpa >> 12)


def _drop(vcpu: KvmVcpu, gfn: int) -> None:
    # The host took the page from under its entry without telling us.  Fault it in again, which
    # says what is wrong with it.
    kvm_mmu_zap_gfn(vcpu.kvm, gfn)
