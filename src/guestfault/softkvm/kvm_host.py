"""``struct kvm`` and ``struct kvm_vcpu``: the state that all of the fault path works on.

As in the kernel, the structures stand below the functions: each module of this room takes one of
them and does its part.  What userspace holds are the objects of :mod:`guestfault.softkvm.system`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field

from guestfault.dialect.record import Dialect, Site
from guestfault.softkvm.memslots import Memslots
from guestfault.softkvm.mm import Mm
from guestfault.softkvm.preempt import preemption_point, wait
from guestfault.softkvm.processor import MAX_PHYS, REQUESTED, MakeProcessor, Processor, Stop
from guestfault.softkvm.refusal import GuestException, Refusal, Retry
from guestfault.softkvm.second_stage import SecondStage
from guestfault.uapi import kvm as uapi
from guestfault.x86.paging import PagingState, Table
from guestfault.x86.registers import CR0_PE, CR0_PG, CR4_SMAP, EFER_LMA, X86_EFLAGS_AC

__all__ = [
    "Kvm",
    "KvmVcpu",
    "Request",
    "VcpuStat",
    "kvm_check_request",
    "kvm_get_running_vcpu",
    "kvm_make_request",
    "vcpu_load",
    "vcpu_put",
]

MAX_PHYS_BITS = MAX_PHYS.bit_length() - 1


Walked = tuple[int, int, bool, int]
"""A translation: (guest physical page, rights, dirty, what was asked for)."""


class Request:
    """``KVM_REQ_*``: bits of :attr:`KvmVcpu.requests`."""

    TLB_FLUSH = 1
    SIGNAL = 2  # somebody kicked the vCPU: what a pending signal is to the kernel


@dataclass(slots=True)
class VcpuStat:
    """Counters under KVM's names (``struct kvm_vcpu_stat``)."""

    exits: int = 0
    pf_taken: int = 0
    pf_fixed: int = 0
    pf_spurious: int = 0
    pf_emulate: int = 0
    mmio_exits: int = 0
    io_exits: int = 0


@dataclass(eq=False, slots=True)
class Kvm:
    """``struct kvm``."""

    dialect: Dialect
    mm: Mm
    tdp_enabled: bool = True
    """Two-dimensional paging (NPT, EPT); without it KVM keeps shadow page tables."""
    make_processor: MakeProcessor | None = None
    second_stage: SecondStage = field(default_factory=SecondStage)
    memslots: Memslots = field(default_factory=Memslots)
    slots_lock: threading.Lock = field(default_factory=threading.Lock)
    # The dialect's answers to what every fault asks; a set of enumeration members is slow to ask.
    missing_flag: int = field(init=False)
    annotates_error_pfn: bool = field(init=False)

    def __post_init__(self) -> None:
        missing = self.dialect.missing
        self.missing_flag = missing.slot_flag if missing is not None else 0
        self.annotates_error_pfn = Site.HANDLE_ERROR_PFN in self.dialect.annotated


class KvmVcpu:
    """``struct kvm_vcpu``.  Everything but ``requests`` belongs to the thread that runs it.

    ``in_guest_mode`` is ``vcpu->mode``: whoever needs the vCPU's attention sets a bit in
    ``requests`` and then, if it is in guest mode, stops the processor until it has left
    (:func:`kvm_make_request`).  It leaves under ``mode_lock``, so that no stop can come after and
    hit something else that the processor does.
    """

    def __init__(self, kvm: Kvm, vcpu_id: int, run: uapi.kvm_run, run_area: memoryview) -> None:
        self.kvm = kvm
        self.vcpu_id = vcpu_id
        self.run = run
        self.run_area = run_area
        self.stat = VcpuStat()
        self.requests = 0
        self.requests_lock = threading.Lock()
        self.in_guest_mode = False
        self.mode_lock = threading.Lock()
        self.thread: int | None = None
        self.sregs = uapi.kvm_sregs()
        self.sregs_changed = True
        self.mapped_memslots = Memslots()
        self.pending_exception: GuestException | None = None
        self.complete_userspace_io: Callable[[], int] | None = None
        self.refusal: Refusal = Retry()
        self.last_error = ""
        # The first stage: the registers that decide a walk, and the last tables walked to, as in a
        # processor's paging-structure caches.  ``device_pages`` is set during a device access only.
        self.cpl = 0
        self.paging = PagingState(0, 0, 0, 0)
        self.protected = self.smap = False
        self.table_shift = 0
        self.tables: dict[int, Table] = {}
        self.walked: Walked | None = None
        self.device_pages: dict[int, int] | None = None
        self.system_page: int | None = None  # linear; what the processor accesses for itself
        self.refused_fetch: int | None = None  # linear; the TLB miss refused last was this fetch
        self.cpu: Processor  # set by the owner: its hooks are functions over this structure

    def enter_guest(self, execute: Callable[[], Stop]) -> Stop:
        """Have the processor execute guest code; REQUESTED if a request must be served first."""
        preemption_point("vcpu_enter_guest: enter", ("requests", self.vcpu_id), True)
        self.in_guest_mode = True
        if self.requests:
            # Made before we were in guest mode: nobody would stop us.
            self.in_guest_mode = False
            return REQUESTED
        try:
            return execute()
        finally:
            preemption_point("vcpu_enter_guest: leave", ("requests", self.vcpu_id), True)
            with self.mode_lock:
                self.in_guest_mode = False

    def forget_walks(self) -> None:
        """Forget what was found out about the guest's page tables."""
        self.tables.clear()
        self.walked = None

    @property
    def rflags(self) -> int:
        """RFLAGS."""
        return self.cpu.read_rflags()

    @property
    def long_mode(self) -> bool:
        """EFER.LMA."""
        return bool(self.sregs.efer & EFER_LMA)

    @property
    def smap_ac(self) -> bool:
        """RFLAGS.AC, where it matters."""
        return self.smap and self.cpu.read_rflags() & X86_EFLAGS_AC != 0

    def refresh_cpl(self) -> None:
        """Read the privilege level from the processor; the guest changes it without telling."""
        self.cpl = self.cpu.read_cs() & 3 if self.protected else 0

    def load_sregs(self) -> None:
        """Make the processor's system registers those in :attr:`sregs`."""
        s = self.sregs
        self.cpu.load(s)
        self.paging = PagingState(s.cr0, s.cr3, s.cr4, s.efer, maxphyaddr=MAX_PHYS_BITS)
        self.table_shift = self.paging.mode.shift(2) if s.cr0 & CR0_PG else 0
        self.protected, self.smap = bool(s.cr0 & CR0_PE), bool(s.cr4 & CR4_SMAP)
        self.forget_walks()
        self.sregs_changed = False
        self.refresh_cpl()

    def sync_sregs(self) -> uapi.kvm_sregs:
        """Bring :attr:`sregs` up to date with what the guest has loaded by itself, and give it."""
        if not self.sregs_changed:
            self.cpu.read_system(self.sregs)
        return self.sregs


# A context variable, so that a coroutine can stand for a thread.
_kvm_running_vcpu: ContextVar[KvmVcpu | None] = ContextVar("kvm_running_vcpu", default=None)


def kvm_get_running_vcpu() -> KvmVcpu | None:
    """The vCPU that this thread has loaded."""
    return _kvm_running_vcpu.get()


def vcpu_load(vcpu: KvmVcpu) -> None:
    """Make ``vcpu`` this thread's running vCPU, as every vCPU ioctl does first."""
    _kvm_running_vcpu.set(vcpu)


def vcpu_put() -> None:
    """The thread has no running vCPU any more."""
    _kvm_running_vcpu.set(None)


def kvm_make_request(vcpu: KvmVcpu, request: int) -> None:
    """Also ``kvm_vcpu_kick``: returns when the vCPU has been outside guest mode since.

    It may be in again: then it has taken the request, as it must on the way.
    """
    shared = "requests", vcpu.vcpu_id
    preemption_point("kvm_make_request: set the bit", shared, True)
    with vcpu.requests_lock:
        vcpu.requests |= request

    def left() -> bool:
        if not (vcpu.in_guest_mode and vcpu.requests & request):
            return True
        with vcpu.mode_lock:
            if vcpu.in_guest_mode:
                # One that comes before the processor has begun is lost: it is repeated.
                vcpu.cpu.stop()
        # A signal handler, called in the midst of a hook: the run ends with that.
        return kvm_get_running_vcpu() is vcpu

    wait("kvm_make_request: until it has left guest mode", shared, left)


def kvm_check_request(vcpu: KvmVcpu, request: int) -> bool:
    """Whether there is such a request; it is taken."""
    if not vcpu.requests & request:
        return False
    preemption_point("kvm_check_request: take the bit", ("requests", vcpu.vcpu_id), True)
    with vcpu.requests_lock:
        vcpu.requests &= ~request
    return True
