"""The helper that tells userspace which access failed: the seed thread's ``kvm_handle_efault``.

The thread's worry is a fill that lands on the wrong vCPU's run page, or on a run page that holds
another exit.  Its remedy is the guard here: the vCPU must be the one that this thread has loaded
(``kvm_running_vcpu``), or nothing is written.  The caller returns -EFAULT either way.
"""

from __future__ import annotations

import errno
import warnings

from guestfault.dialect.record import Guard
from guestfault.softkvm.kvm_host import KvmVcpu, kvm_get_running_vcpu

__all__ = ["kvm_handle_efault"]


def kvm_handle_efault(vcpu: KvmVcpu, gpa: int, size: int, flags: int) -> int:
    """Fill ``kvm_run.memory_fault`` if the dialect's guard lets it.  Always returns -EFAULT."""
    dialect = vcpu.kvm.dialect
    if dialect.guard is Guard.LOADED_VCPU and kvm_get_running_vcpu() is not vcpu:
        warnings.warn(f"kvm_handle_efault: vCPU {vcpu.vcpu_id} is not the loaded one", stacklevel=2)
        return -errno.EFAULT
    run = vcpu.run
    run.exit_reason = dialect.interface.exit_reason
    fault = run.memory_fault
    fault.flags, fault.gpa, fault.size = flags, gpa, size
    return -errno.EFAULT
