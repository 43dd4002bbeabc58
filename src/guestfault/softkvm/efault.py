"""The helper that tells userspace which access failed, for every published version of it.

It has had four names: ``kvm_memfault_exit_or_efault`` (WIP v2), ``kvm_populate_efault_info`` (v3,
v4), ``kvm_handle_guest_uaccess_fault`` (v5) and ``kvm_prepare_memory_fault_exit`` (v6 and what was
merged).  Here it has the one of the seed thread's sketch, :func:`kvm_handle_efault`, is written
once, and asks the dialect: whether this site is annotated, whether userspace has opted in, what
must hold before ``kvm_run`` may be written (the guards), where the payload goes, and what
``KVM_RUN`` then fails with.

The thread's worry is a fill that lands on the wrong vCPU's run page, or on a run page that holds
another exit.  Its remedy is a guard: the vCPU must be the one that this thread has loaded
(``kvm_running_vcpu``), or nothing is written.

A filled page must also not outlive its exit.  The versions differ in when they see to that:
:func:`kvm_run_begin` is called as ``KVM_RUN`` begins, :func:`vcpu_run_begin` when the last exit is
complete and the guest is about to be entered.
"""

from __future__ import annotations

import errno

from guestfault.dialect.record import Dialect, Guard, Reason, Reset, Site
from guestfault.dialect.unmerged import (
    KVM_SPEC_EXIT_MEMORY_FAULT,
    KVM_SPEC_EXIT_UNUSED,
    speculative_exit,
)
from guestfault.softkvm import preempt
from guestfault.softkvm.kvm_host import Kvm, KvmVcpu, kvm_get_running_vcpu
from guestfault.softkvm.preempt import preemption_point
from guestfault.uapi import kvm as uapi

__all__ = ["forget_annotation", "kvm_handle_efault", "kvm_run_begin", "vcpu_run_begin"]

# An attribute of an enumeration is a slow thing to ask for.
_UNKNOWN, _MISSING = Reason.UNKNOWN, Reason.MISSING
_LOADED_VCPU, _EXIT_REASON_UNKNOWN = Guard.LOADED_VCPU, Guard.EXIT_REASON_UNKNOWN
_CANARY = Guard.CANARY
_TRIPPED = {
    _LOADED_VCPU: "is not the loaded one",
    _EXIT_REASON_UNKNOWN: "has exit {} prepared",
    _CANARY: "is filled already",
}
_AT_ENTRY, _BEFORE_LOOP = Reset.AT_ENTRY, Reset.BEFORE_LOOP


def kvm_handle_efault(
    vcpu: KvmVcpu,
    site: Site,
    gpa: int,
    size: int,
    *,
    write: bool = False,
    exec_: bool = False,
    private: bool = False,
    reason: Reason = _UNKNOWN,
    r: int = -errno.EFAULT,
) -> int:
    """An access to ``[gpa, gpa + size)`` failed at ``site``: what the caller is to return.

    Where the dialect annotates the site and nothing forbids it, ``kvm_run`` is filled; the result
    is then the dialect's.  Else it is ``r``, a negative errno, and nothing is written.
    """
    kvm = vcpu.kvm
    dialect = kvm.dialect
    if site not in dialect.annotated:
        return r
    if kvm.filters_reasons and not _wanted(kvm, dialect, reason):
        return r
    if dialect.guards and not _guards_let(kvm, dialect, vcpu):
        return r
    if site in dialect.sizes_in_pages:
        size >>= 12
    interface = dialect.interface
    flags = dialect.flag_write if write else dialect.flag_exec if exec_ else dialect.flag_read
    if private:
        flags |= dialect.flag_private
    if reason is _UNKNOWN:
        flags |= dialect.flag_unknown
    else:
        flags |= dialect.flag_missing if reason is _MISSING else dialect.flag_userfault
    if preempt.scheduler is not None:
        preemption_point("kvm_handle_efault: fill kvm_run", ("kvm_run", vcpu.vcpu_id), True)
    if not kvm.second_union:
        fault = vcpu.run.memory_fault
        vcpu.run.exit_reason = interface.exit_reason
        fault.gpa, fault.size = gpa, size
        if interface.flags_written:
            fault.flags = flags
    else:
        second = speculative_exit(vcpu.run_area)
        second.flags, second.gpa, second.len = flags, gpa, size
        vcpu.speculative_exit_canary = KVM_SPEC_EXIT_MEMORY_FAULT
        vcpu.run.flags |= interface.filled_flag
    return r if dialect.fill_errno == errno.EFAULT else -dialect.fill_errno


def _wanted(kvm: Kvm, dialect: Dialect, reason: Reason) -> bool:
    """Whether userspace has asked for it, in the versions that want to be asked."""
    if kvm.must_opt_in:
        asked = dialect.flag_missing if reason is _MISSING else dialect.flag_unknown
        return kvm.fill_efault_info or kvm.memfault_exit_reasons & asked != 0
    return reason is _MISSING  # of annotates_only_missing


def _guards_let(kvm: Kvm, dialect: Dialect, vcpu: KvmVcpu) -> bool:
    """Look at each guard; whether none of them forbids to fill."""
    for guard in dialect.guards:
        if guard is _LOADED_VCPU:
            running = kvm_get_running_vcpu()
            tripped = running is not vcpu
        elif guard is _EXIT_REASON_UNKNOWN:
            tripped = vcpu.run.exit_reason != uapi.KVM_EXIT_UNKNOWN
        elif guard is _CANARY:
            tripped = vcpu.speculative_exit_canary != KVM_SPEC_EXIT_UNUSED
        else:
            continue  # VCPU_NOT_NULL: here the type says so
        if tripped:
            text = _TRIPPED[guard].format(vcpu.run.exit_reason)
            kvm.warn_on_once(f"kvm_handle_efault: vCPU {vcpu.vcpu_id} {text}")
            if guard not in dialect.warns_only:
                return False
    return True


def kvm_run_begin(vcpu: KvmVcpu) -> None:
    """``KVM_RUN`` begins; the last exit may not be complete yet."""
    kvm = vcpu.kvm
    if kvm.reset is _AT_ENTRY:
        vcpu.run.exit_reason = uapi.KVM_EXIT_UNKNOWN
    if kvm.second_union:
        vcpu.speculative_exit_canary = KVM_SPEC_EXIT_UNUSED
        vcpu.run.flags &= ~kvm.dialect.interface.filled_flag


def vcpu_run_begin(vcpu: KvmVcpu) -> None:
    """The last exit is complete; the guest is about to be entered."""
    if vcpu.kvm.reset is _BEFORE_LOOP:
        vcpu.run.exit_reason = uapi.KVM_EXIT_UNKNOWN


def forget_annotation(vcpu: KvmVcpu) -> None:
    """Take an annotation back that no processor would have caused: ours translates ahead."""
    if vcpu.kvm.second_union:
        vcpu.speculative_exit_canary = KVM_SPEC_EXIT_UNUSED
        vcpu.run.flags &= ~vcpu.kvm.dialect.interface.filled_flag
    else:
        vcpu.run.exit_reason = uapi.KVM_EXIT_UNKNOWN
