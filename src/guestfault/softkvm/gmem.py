"""``struct kvm_gmem``, and what a memory slot keeps of it: the structures of guest_memfd.

A file is bound to slots, each to another part of it (``virt/kvm/guest_memfd.c``).  The slot's
pointer to the file is not a reference: it is cleared when the file is released, under the vCPUs'
feet.  What is done with them is :mod:`guestfault.softkvm.guest_memfd`.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

from guestfault.softkvm.gmem_file import GmemFile

__all__ = ["GmemBinding", "KvmGmem"]


@dataclass(eq=False, slots=True)
class KvmGmem:
    """One file of ``size`` bytes; ``lock`` is its ``filemap_invalidate_lock``."""

    file: GmemFile
    size: int
    flags: int
    bindings: list[GmemBinding] = field(default_factory=list)
    """Those of slots that there are, after the release, too."""
    released: bool = False
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(eq=False, slots=True)
class GmemBinding:
    """``slot->gmem``: the slot's frames are the file's pages from ``pgoff`` on.

    ``file`` is ``None`` once that is released.
    """

    gmem: KvmGmem
    file: GmemFile | None
    pgoff: int
    base_gfn: int
    npages: int

    @property
    def address(self) -> int:
        """Where KVM has the slot's first page mapped, as long as the slot is there."""
        return self.gmem.file.address + self.pgoff * 4096
