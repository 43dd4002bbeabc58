"""What the compiled loop and Python tell each other: one row of 64-bit words for each vCPU.

The loop runs without the GIL and can neither call Python nor look at its objects.  So all that it
is told stands in this row, at the places named here, and all that it has to tell is counted in it.
A row belongs to the thread that runs the vCPU; nobody else writes it, and no two vCPUs' rows share
a cache line.  The pages' own state, which all vCPUs share, is elsewhere
(:mod:`~guestfault.paging.claims`).

A C program that gets the same row can do the same work: ``benchmarks/hot_loop.c`` is one, for
comparison.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from guestfault.uapi import kvm as uapi

Words: TypeAlias = NDArray[np.int64]

# -- what the loop is told -----------------------------------------------------------------------

VCPU_FD: Final = 0
KVM_RUN_AT: Final = 1
"""Where ``struct kvm_run`` is mapped."""
FAULT_EXIT: Final = 2
"""The ``exit_reason`` that comes with -EFAULT and vouches for ``memory_fault``; or -1."""

RING_HEAD_AT: Final = 3
"""Where the trace ring's ``data_head`` is; 0: there is no ring."""
RING_AT: Final = 4
RING_SIZE: Final = 5
EXIT_ID: Final = 6
"""The number of ``kvm_userspace_exit``, and below where its errno is in a record."""
EXIT_ERRNO: Final = 7
BEGINS: Final = 8
"""Three words: the events that begin something, -1 for none."""
FAULT_EVENTS: Final = 11
"""Two rows of three words: an event that names an access or -1, where its address is in a record,
and whether that is a gva."""

SLOTS: Final = 17
"""How many memory slots there are; they stand from :data:`SLOT_TABLE` on."""
GUEST_AT: Final = 18
HOST_AT: Final = 19
PAGES: Final = 20
FILLED_AT: Final = 21
"""A byte for each page: not 0 once its bytes are there, and above 1 while it is withheld
(:mod:`~guestfault.paging.ahead`)."""
CLAIMS_AT: Final = 22
"""A byte for each page: 1 once somebody has taken it upon himself to fill it."""
LET_IN: Final = 23
UFFD: Final = 24
SOURCE: Final = 25
SOURCE_AT: Final = 26
"""The address of the source's bytes, or its file descriptor."""
STAGING_AT: Final = 27
"""As many pages as a window has, of this vCPU's own."""
WINDOW: Final = 28
"""How many pages may come in with the one that is missing, itself included: a power of two."""
BUDGET: Final = 29
"""Faults after which the loop returns although nothing is the matter, and nanoseconds."""
BUDGET_NS: Final = 30
TIMED: Final = 31
"""Whether to time the system calls."""

# -- what it counts ------------------------------------------------------------------------------

LAST_PAGE: Final = 32
"""The guest physical page of the last fault that was resolved, here or in Python; -1: none."""
ANNOTATED: Final = 33
BARE: Final = 34
AGAIN: Final = 35
PAGES_IN: Final = 36
LATENCY_TOTAL: Final = 37
LATENCY_MAX: Final = 38
NS_ALL: Final = 39
"""Nanoseconds from the loop's beginning to its return; and, with :data:`TIMED`, those of them spent
in KVM_RUN and in userfaultfd's ioctls."""
NS_RUN: Final = 40
NS_LET_IN: Final = 41

# -- of a reader of a userfaultfd's events (:mod:`~guestfault.paging.hot_reader`) ------------------

STOP_FD: Final = 44
MESSAGES: Final = 45
"""How many messages to read at a time; :data:`STAGING_AT` is where to."""
SERVED: Final = 46

# -- its own -------------------------------------------------------------------------------------

FOUND_GVA: Final = 42
GOES_ON: Final = 43
"""Whether the fault at hand goes on with the first stream."""
SCRATCH: Final = 48
"""Eight words: the arguments of system calls."""
STREAMS: Final = 56
"""For each of :data:`STREAM_COUNT` streams the first page of its last window, the end of that and
how wide it was (:mod:`~guestfault.paging.hot_around`)."""
STREAM_COUNT: Final = 6
STREAM_WORDS: Final = 3
LOT: Final = 74
"""The state of a random number generator; any number to begin with."""
AHEAD: Final = 75
"""Counts: of :data:`PAGES_IN`, the pages that nobody had asked for; of these, the withheld ones;
and of these, the ones that were faulted on."""
WITHHELD: Final = 76
WANTED: Final = 77
SLOT_TABLE: Final = 78
"""Three words for each slot: its first gpa, its end, and what to add for an offset in the RAM."""
SLOT_WORDS: Final = 3

# -- values --------------------------------------------------------------------------------------

LET_IN_BY_USERFAULTFD: Final = 0
LET_IN_BY_POPULATING: Final = 1

SOURCE_NONE: Final = 0
"""The bytes are in the host view already."""
SOURCE_MEMORY: Final = 1
SOURCE_FILE: Final = 2
SOURCE_PYTHON: Final = 3
"""Only Python can read it: every page that is not filled is handed back."""

NOTHING: Final = 1
"""What the loop returns when its budget is spent.  No result of KVM_RUN's is positive."""

# -- where things are in struct kvm_run ----------------------------------------------------------

RUN_EXIT_REASON: Final[int] = uapi.kvm_run.exit_reason.offset
_UNION: Final[int] = uapi.kvm_run._exit.offset
RUN_FAULT_GPA: Final[int] = _UNION + 8  # behind its flags
RUN_FAULT_SIZE: Final[int] = _UNION + 16
_SREGS: Final[int] = uapi.kvm_run.s.offset + uapi.kvm_sync_regs.sregs.offset
RUN_CR0: Final[int] = _SREGS + uapi.kvm_sregs.cr0.offset
RUN_CR3: Final[int] = _SREGS + uapi.kvm_sregs.cr3.offset
RUN_CR4: Final[int] = _SREGS + uapi.kvm_sregs.cr4.offset
RUN_EFER: Final[int] = _SREGS + uapi.kvm_sregs.efer.offset
