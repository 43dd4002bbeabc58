"""guest_memfd: memory that KVM has a file of, rather than an address (virt/kvm/guest_memfd.c).

``KVM_CREATE_GUEST_MEMFD`` makes the file, ``KVM_SET_USER_MEMORY_REGION2`` binds a part of it to a
slot.  A fault that is to be served from it takes its page from the file
(:func:`kvm_gmem_get_pfn`) and asks no VMA, no userfaultfd and no protection: there is none.  In
a VM with private memory these are the private faults.  A file made with ``GUEST_MEMFD_FLAG_MMAP``
(7.3; Linux has it since 6.18) serves all of the slot's, and the slot's address is then for KVM's
own copies alone (:mod:`guestfault.softkvm.guest_access`), whether it is where the file is mapped or
not.

When userspace has let go of the file, its memory is gone: every slot loses it, what is mapped is
zapped, and further faults fail.  The kernel does so in the last ``close``.  We find out later
(:mod:`guestfault.softkvm.gmem_file`): as a vCPU enters ``KVM_RUN``, and at every fault in such a
slot.  In between a guest that is running may still use what it had mapped.

A hole that userspace punches needs nothing done: an entry leads to the file by an address, where
the next access finds a fresh page of zeros.
"""

from __future__ import annotations

import errno

from guestfault.dialect.record import Dialect
from guestfault.softkvm.gmem import GmemBinding, KvmGmem
from guestfault.softkvm.kvm_host import Kvm, kvm_flush_remote_tlbs
from guestfault.softkvm.memslots import PAGE_SIZE, KvmMemorySlot
from guestfault.softkvm.preempt import preemption_point
from guestfault.uapi import kvm as uapi

__all__ = [
    "kvm_gmem_bind",
    "kvm_gmem_create",
    "kvm_gmem_destroy",
    "kvm_gmem_get_pfn",
    "kvm_gmem_get_supported_flags",
    "kvm_gmem_release",
    "kvm_gmem_release_closed",
    "kvm_gmem_unbind",
]

_GMEM = "gmem"


def kvm_gmem_get_supported_flags(dialect: Dialect, has_private_mem: bool) -> int:
    """``GUEST_MEMFD_FLAG_*`` of files in such a VM.

    Where memory can be private a file does not begin shared.
    """
    flags = dialect.guest_memfd_flags or 0
    return flags & ~uapi.GUEST_MEMFD_FLAG_INIT_SHARED if has_private_mem else flags


def kvm_gmem_create(kvm: Kvm, size: int, flags: int) -> int:
    """A new file: its descriptor, or -EINVAL."""
    if flags & ~kvm_gmem_get_supported_flags(kvm.dialect, kvm.has_private_mem):
        return -errno.EINVAL
    if not 0 < size < 1 << 63 or size & PAGE_SIZE - 1:
        return -errno.EINVAL
    fd, file = kvm.gmem_files.create(size)
    kvm.gmems.append(KvmGmem(file, size, flags))
    kvm.has_gmem = True
    return fd


def kvm_gmem_bind(kvm: Kvm, slot: KvmMemorySlot, fd: int, offset: int) -> int:
    """Bind a slot that nobody sees yet: 0, -EBADF or -EINVAL.  ``slots_lock`` is held."""
    inode = kvm.gmem_files.inode_of(fd)
    if inode is None:
        return -errno.EBADF
    kvm_gmem_release_closed(kvm)
    gmem = next((g for g in kvm.gmems if g.file.inode == inode and not g.released), None)
    if gmem is None:  # no guest_memfd, or another VM's
        return -errno.EINVAL
    if offset & PAGE_SIZE - 1 or offset + slot.npages * PAGE_SIZE > gmem.size:
        return -errno.EINVAL
    start = offset // PAGE_SIZE
    with gmem.lock:
        if any(
            start < other.pgoff + other.npages and other.pgoff < start + slot.npages
            for other in gmem.bindings
        ):
            return -errno.EINVAL
        slot.gmem = GmemBinding(gmem, gmem.file, start, slot.base_gfn, slot.npages)
        slot.gmem_only = gmem.flags & uapi.GUEST_MEMFD_FLAG_MMAP != 0
        gmem.bindings.append(slot.gmem)
    return 0


def kvm_gmem_unbind(kvm: Kvm, slot: KvmMemorySlot) -> None:
    """The slot is gone, and nobody uses it any more."""
    binding = slot.gmem
    if binding is None:
        return
    gmem = binding.gmem
    with gmem.lock:
        gmem.bindings.remove(binding)
    _free_if_unused(kvm, gmem)


def kvm_gmem_release_closed(kvm: Kvm) -> None:
    """Do what the last ``close`` of a file would have done, for each that was closed since."""
    for gmem in tuple(kvm.gmems):
        if not gmem.released and not gmem.file.is_open():
            kvm_gmem_release(kvm, gmem)


def kvm_gmem_release(kvm: Kvm, gmem: KvmGmem) -> None:
    """Userspace has let go of the file: take it from every slot.  ``mmu_lock`` is not held."""
    with gmem.lock:
        if gmem.released:
            return
        gmem.released = True
        bindings = tuple(gmem.bindings)
        for binding in bindings:
            binding.file = None
    stage, zapped = kvm.second_stage, False
    for binding in bindings:
        gfns = range(binding.base_gfn, binding.base_gfn + binding.npages)
        zapped |= stage.kvm_mmu_invalidate_begin((gfns,))
    if zapped:
        kvm_flush_remote_tlbs(kvm)
    for binding in bindings:
        gfns = range(binding.base_gfn, binding.base_gfn + binding.npages)
        stage.kvm_mmu_invalidate_end((gfns,))
    gmem.file.discard()
    _free_if_unused(kvm, gmem)


def _free_if_unused(kvm: Kvm, gmem: KvmGmem) -> None:
    # As long as there is a slot, the processor knows the address: not that it uses it.
    with gmem.lock:
        unused = gmem.released and not gmem.bindings and gmem in kvm.gmems
        if unused:
            kvm.gmems.remove(gmem)
    if unused:
        gmem.file.close()


def kvm_gmem_destroy(kvm: Kvm) -> None:
    """The VM is gone, and its processors.  Userspace's descriptors are userspace's."""
    while kvm.gmems:
        kvm.gmems.pop().file.close()


def kvm_gmem_get_pfn(kvm: Kvm, slot: KvmMemorySlot, gfn: int) -> tuple[int, int]:
    """The page behind a frame of a slot that is bound: (0, its pfn) or (a negative errno, 0).

    -EFAULT: the file is gone.  -EHWPOISON: the page is.  Anything else: there is no memory for it.
    """
    binding = slot.gmem
    assert binding is not None
    preemption_point("kvm_gmem_get_pfn: read the slot's file", _GMEM)
    file = binding.file
    if file is not None and not file.is_open():
        kvm_gmem_release(kvm, binding.gmem)
        file = None
    if file is None:
        return -errno.EFAULT, 0
    hva = binding.address + (gfn - slot.base_gfn) * PAGE_SIZE
    r = kvm.mm.get_user_pages_unlocked(hva, True)
    return (r, 0) if r < 0 else (0, hva // PAGE_SIZE)
