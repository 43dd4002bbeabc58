"""The pages that a vCPU shares with KVM: ``struct kvm_run``, and the data of port I/O behind it.

``KVM_RUN`` writes them, so they must stay mapped while anybody can look at them: a view of unmapped
memory crashes the process.  Python helps: a mapping with live views refuses to close.
"""

from __future__ import annotations

import contextlib
import mmap

from guestfault.dialect.unmerged import kvm_run_v5
from guestfault.errors import KernelError
from guestfault.uapi import kvm as uapi

__all__ = ["RunArea"]


class RunArea:
    """The run area of the vCPU behind ``fd``: ``size`` bytes, mapped shared and writable.

    ``view`` is all of it, ``kvm_run`` the structure at its start; both live.  Raises
    :class:`~guestfault.errors.KernelError`: ENOMEM, or EMFILE, for the mapping takes a descriptor.
    """

    view: memoryview
    kvm_run: uapi.kvm_run

    def __init__(self, fd: int, size: int) -> None:
        try:
            self._mapping = mmap.mmap(fd, size)
        except OSError as error:
            raise KernelError("mmap", error.errno or 0, f"run area of {size:#x} bytes") from None
        self._look_at(self._mapping)

    def close(self) -> None:
        """Unmap; ``view`` and ``kvm_run`` keep what they last held, as copies.

        A view that somebody else still has keeps the mapping, and with it the VM, until it goes.
        """
        if not self._mapping.closed:
            self._look_at(bytearray(self.view))
            with contextlib.suppress(BufferError):
                self._mapping.close()

    def _look_at(self, memory: mmap.mmap | bytearray) -> None:
        self.view = memoryview(memory)
        self.kvm_run = kvm_run_v5.from_buffer(memory)
