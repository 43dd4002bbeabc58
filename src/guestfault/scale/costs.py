"""What a fault costs on a machine, part by part: the simulation's only input.

The parts are those of Linux's code path (``fs/userfaultfd.c``, ``virt/kvm``); which of them is slow
where many processors meet is what the two published tables say of the machine that they were
measured on (:mod:`guestfault.scale.fit`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

__all__ = ["PUBLISHED_MACHINE", "Costs"]


@dataclass(frozen=True, slots=True)
class Costs:
    """All times in microseconds, per fault."""

    # -- a fault that comes back to the vCPU's thread -------------------------------------------
    exit_alone: float
    """Exit, KVM_RUN's return, UFFDIO_CONTINUE, KVM_RUN, and the access made again: nobody else."""
    exit_shared: float
    """What it takes more as soon as another vCPU shares the address space's cache lines."""
    space_each: float
    """The part of it that all vCPUs take turns at (the address space), when many queue for it."""
    space_handoff: float
    """What the turn takes more when few queue for it, and each has to wait to be let in."""
    space_batch: float
    """So many in the queue halve the hand-off: those who wait together are let in together."""

    # -- a fault that userfaultfd's handler resolves --------------------------------------------
    vcpu: float
    """The vCPU's own part: exit, fault, and after the wake-up the access made again."""
    reader_wake: float
    """Until a reader that sleeps has been woken."""
    vcpu_wake: float
    """Until the vCPU that is woken runs."""
    handler: float
    """The handler between its system calls."""
    enqueue: float
    """Under the userfaultfd's wait-queue lock: the vCPU joins the waiters."""
    read: float
    """Under it: a reader takes a message and moves its waiter to the other queue."""
    wake: float
    """Under it: the waiter is woken,"""
    walk: float
    """and each waiter is looked at for it, this long each (``__wake_userfault``)."""
    lock_handoff: float
    """What each of the three takes more when the lock is handed from one processor to another."""
    lock_queue: float
    """So many in its queue make the hand-off dear in full."""
    space_alone: float
    """The address space's part in UFFDIO_CONTINUE and in the two faults, with a single vCPU."""
    space_near: float
    """The same with several vCPUs, threads that go to sleep and wake in it, on one socket."""
    space_far: float
    """What it takes more when the turn goes to another socket."""

    # -- the machine ----------------------------------------------------------------------------
    cores_per_socket: int
    sockets: int


PUBLISHED_MACHINE: Final = Costs(
    exit_alone=3.05,
    exit_shared=0.574,
    space_each=0.202,
    space_handoff=0.839,
    space_batch=7.64,
    vcpu=0.971,
    reader_wake=0.375,
    vcpu_wake=0.331,
    handler=0.126,
    enqueue=0.616,
    read=1.05,
    wake=1.9,
    walk=0.159,
    lock_handoff=0.875,
    lock_queue=21.6,
    space_alone=0.631,
    space_near=4.07,
    space_far=2.48,
    cores_per_socket=64,
    sockets=4,
)
"""Four AMD EPYC 7B13 of 64 cores at 2.2 GHz, fitted by ``benchmarks/scale_fit.py``.

Fitted to the two tables at the numbers of vCPUs in :data:`guestfault.scale.compare.FITTED_AT`."""
