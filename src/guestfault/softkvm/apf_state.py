"""The state of asynchronous page faults: ``struct kvm_async_pf`` and what a vCPU keeps of them.

The structures stand here, below the vCPU that holds them; what is done with them is
:mod:`guestfault.softkvm.async_pf` and :mod:`guestfault.softkvm.async_pf_ready`.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass, field

from guestfault.softkvm.guest_cache import GfnToHvaCache

__all__ = ["ASYNC_PF_PER_VCPU", "KvmArchAsyncPf", "KvmAsyncPf", "VcpuApf", "VcpuAsyncPf"]

ASYNC_PF_PER_VCPU = 64


@dataclass(slots=True)
class KvmArchAsyncPf:
    """``struct kvm_arch_async_pf``: under what circumstances the guest met the fault."""

    token: int = 0
    gfn: int = 0
    cr3: int = 0
    direct_map: bool = True
    error_code: int = 0


@dataclass(eq=False, slots=True)
class KvmAsyncPf:
    """``struct kvm_async_pf``: one page that a worker is bringing in for one vCPU.

    ``addr`` is the page's hva.  ``cancelled`` says that the vCPU wants to hear no more of it.
    """

    cr2_or_gpa: int = 0
    addr: int = 0
    arch: KvmArchAsyncPf = field(default_factory=KvmArchAsyncPf)
    wakeup_all: bool = False
    notpresent_injected: bool = False
    cancelled: bool = False


@dataclass(eq=False, slots=True)
class VcpuAsyncPf:
    """``vcpu->async_pf``: what is queued belongs to the vCPU, what is done to the workers too.

    ``queued`` counts every work from its setup until it is reported to the guest.
    """

    queued: int = 0
    queue: list[KvmAsyncPf] = field(default_factory=list)
    done: deque[KvmAsyncPf] = field(default_factory=deque)
    lock: threading.Lock = field(default_factory=threading.Lock)


@dataclass(eq=False, slots=True)
class VcpuApf:
    """``vcpu->arch.apf``: what the guest has asked for, and the faults it waits for."""

    halted: bool = False
    gfns: set[int] = field(default_factory=set)
    data: GfnToHvaCache | None = None
    msr_en_val: int = 0
    msr_int_val: int = 0
    vec: int = 0
    id: int = 0
    send_user_only: bool = False
    delivery_as_pf_vmexit: bool = False
    pageready_pending: bool = False
