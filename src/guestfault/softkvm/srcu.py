"""Who reads the memory slots, and waiting for them: ``kvm->srcu``.

When ``KVM_SET_USER_MEMORY_REGION`` returns, userspace may unmap what the old slot was backed by.
So nobody may be left who found that slot and still uses its host address.  A vCPU that handles a
fault found it without any lock; therefore it counts as a *reader* all the while, and
:func:`~guestfault.softkvm.set_memslot.kvm_swap_active_memslots` publishes the next list and then
waits, with :func:`synchronize_srcu`, until each vCPU has been no reader once.  Who begins to read
after that finds the new list.

A vCPU reads from the beginning of ``KVM_RUN`` to its end, but not in guest mode, where it has no
more than what the second stage lets it have; not while it is blocked; and not where it gives way
because a fault must be tried again (:func:`srcu_cond_resched`): that fault may have met a slot
that is marked invalid, and the mark goes when nobody reads.  Other ioctls read while they access
guest memory: ``KVM_TRANSLATE``, ``KVM_GET_MSRS``, ``KVM_SET_MSRS``.  The worker of an asynchronous
page fault does not.  It has the host address, and if there is nothing any more, it gets nothing.

Slow GUP is no exception: a vCPU that sleeps in it for its page reads on, and a change of slots
waits for that page.  It is so in Linux.  Hence whoever brings pages in must not itself change slots
of a VM that waits for one; a kick ends the sleep, and closing a vCPU or its VM begins with that.

SRCU counts readers, per processor, for anybody who reads; here a reader is a vCPU or nobody, and
one at a time, so that a sequence number of its own is enough: odd while it reads
(:attr:`~guestfault.softkvm.kvm_host.KvmVcpu.srcu_seq`).  Nobody but the vCPU writes it.  It changes
where the vCPU's mode does, and is shared with others under the same name as that is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable

from guestfault.softkvm.kvm_host import Kvm, KvmVcpu
from guestfault.softkvm.preempt import cond_resched, preemption_point, wait

__all__ = [
    "kvm_vcpu_srcu_read_lock",
    "kvm_vcpu_srcu_read_unlock",
    "srcu_cond_resched",
    "synchronize_srcu",
]


def kvm_vcpu_srcu_read_lock(vcpu: KvmVcpu) -> None:
    """From now on the slots that it finds stay good.  It reads no more than once at a time."""
    preemption_point("kvm_vcpu_srcu_read_lock", vcpu.shared, True)
    vcpu.srcu_seq |= 1


def kvm_vcpu_srcu_read_unlock(vcpu: KvmVcpu) -> None:
    """It uses no slot any more."""
    preemption_point("kvm_vcpu_srcu_read_unlock", vcpu.shared, True)
    vcpu.srcu_seq += vcpu.srcu_seq & 1  # an exception may have come in between


def srcu_cond_resched(vcpu: KvmVcpu, shared: Hashable, until: Callable[[], bool]) -> None:
    """:func:`~guestfault.softkvm.preempt.cond_resched` of a vCPU that reads, and not meanwhile."""
    kvm_vcpu_srcu_read_unlock(vcpu)
    cond_resched(shared, until)
    kvm_vcpu_srcu_read_lock(vcpu)


def synchronize_srcu(kvm: Kvm) -> None:
    """Return when every vCPU that is reading now has stopped.  It may be reading again."""
    for vcpu in list(kvm.vcpus.values()):
        preemption_point("synchronize_srcu: is it reading", vcpu.shared)
        seq = vcpu.srcu_seq
        if seq & 1:
            name = "synchronize_srcu: until it has stopped"
            wait(name, vcpu.shared, functools.partial(_has_stopped, vcpu, seq))


def _has_stopped(vcpu: KvmVcpu, seq: int) -> bool:
    return vcpu.srcu_seq != seq
